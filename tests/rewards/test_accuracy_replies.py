r"""Where in a reply `accuracy` finds the answer: reference, whole reply, reward."""

from __future__ import annotations

import pytest

from lowvram_grpo.rewards.maths import accuracy

REPLIES = {
    "behind a thought": [
        ("2", r"<think>\boxed{1}? No.</think>The answer is 2.", 1),
        ("1", r"<think>\boxed{1}? No.</think>The answer is 2.", 0),
        ("5", "<think>It is 5.</think>", 0),
        ("42", "<think>a<think>b</think>41</think>42", 1),
        ("42", "maybe 41</think> So 42", 1),
        ("42", "maybe 42</think> So 41", 0),
        ("42", "</think>42", 1),
        ("42", "<think></think><answer>42", 1),
        ("42", "<think>41</think><answer>42</answer><think>or 43", 1),
        (r"\frac{63}{400}", r"Reasoning </think> \boxed{\frac{63}{400}}", 1),
    ],
    "cut off": [
        ("42", "<think>maybe 42", 0),
        ("42", r"<think>maybe \boxed{42}", 0),
        ("42", "<think>maybe 42</think>", 0),
        ("42", "<think>maybe <answer>42</answer>, but then", 0),
        ("42", "<think>so <answer>42</answer>", 1),
        ("18", "<answer>18", 1),
        ("18", r"first \boxed{17}, now \boxed{18", 1),
        ("42", "17+25=", 0),
        ("42", "The answer is", 0),
        ("42", "", 0),
    ],
    "tags": [
        ("18", "<answer>17</answer> no: <answer>18</answer>", 1),
        ("18", "<answer><answer>18</answer></answer>", 1),
        ("18", "18</answer>", 1),
        ("18", "<answer></answer> 18", 0),
        ("18", r"<answer>\boxed{18}</answer>", 1),
        ("18", "<answer>The answer is 18.</answer>", 1),
        ("18", "<answer>She makes $18 every day at the farmer's market.</answer>", 1),
        ("18", "<answer>17</answer> The answer is 18.", 0),
        ("x = 1, y = 2", "<answer>\nx = 1\ny = 2\n</answer>", 1),
        ("5", "<answer>5\n5</answer>", 0),
    ],
    "boxes": [
        ("18", r"first \boxed{17}, then \boxed{18}, out of 20", 1),
        ("17", r"first \boxed{17}, then \boxed{18}, out of 20", 0),
        ("1, 2", r"The roots are \boxed{1} and \boxed{2}.", 1),
        ("x=1, y=2", r"\boxed{x=1}, \boxed{y=2}", 1),
        ("1, 2", r"\boxed{2}", 0),
        ("1, 2", r"\boxed{1}, \boxed{3}", 0),
        ("1, 2", r"\boxed{1}, then \boxed{1, 2}", 1),
        (r"\{1,2\}", r"\boxed{\{1,2\}}", 1),
        (r"\frac{1}{2}", r"\[\boxed{\frac{1}{2}}\]", 1),
        ("5", r"\fbox{5} of 7", 1),
        ("5", r"\boxed 5", 1),
    ],
    "announced": [
        ("5", "The answer is:\n\n$$\n5\n$$", 1),
        ("5", "The answer is:\n5", 1),
        ("5", "## Answer\n\n5", 1),
        ("5", "**Final Answer**\n\n\\[5\\]", 1),
        ("5", "The answer is 5, since 2+3=5 and 7 is out.", 1),
        ("25", "The answer is 5^2 = 25.", 1),
        ("5", "The answer is 5^2 = 25.", 0),
        ("100", "The answer is not 100.", 0),
        ("8", "The answer is 8, not 7.", 1),
        ("19, 46, 82", "The answer to the question is 19, 46, and 82, as they sum to 147.", 1),
        ("82", "The answer is 19, 46, and 82.", 0),
        ("5 km", "The answer is $5$ km.", 1),
        ("5 km", "The answer is $5$ m.", 0),
        ("18.90", r"Therefore the answer is $\$18.90$.", 1),
        ("3.5", "The answer is 3.5. It was 4 before.", 1),
        ("18", "#### 18", 1),
        ("18", "#### Step 18\nIt is 19.", 0),
        ("19", "#### Step 18\nIt is 19.", 1),
        ("18", "答案是18。之前是19。", 1),
    ],
    "prose": [
        ("7", "I have 3 apples. She has 4. Together they have 7 apples.", 1),
        ("7", "We have 3+4=7, so the total number of apples is 7.", 1),
        ("7", "The total is 8, not 7.", 0),
        ("8", "The total is 8, not 7.", 1),
        ("5", "It's 5 because 3+2.", 1),
        ("18", "So he needs 20 seconds - 2 seconds = 18 seconds.", 1),
        ("2", "So he needs 20 seconds - 2 seconds = 18 seconds.", 0),
        ("7200", "The annual increase is $600/month * 12 months/year = $7200/year", 1),
        ("8", "Therefore he still needs 40 / 5 = 8 logs of wood.", 1),
        ("36", "At the end there are 40 - 8 + 4 = 36 gallons left in the tank.", 1),
        ("10", "Working 50 minutes, she earned 0.2 x 50 = $10.", 1),
        ("10", "Sam memorized 4+6=10 digits of pi.", 1),
        ("2950", "After removing 50 of them, 3000 - 50 = 2950 songs are left on her mp3 player.", 1),
        ("800", "14 days cost $500.00 and 6 days cost $300.00 for a total of 500+300 = $800.00", 1),
        ("12", "Step 1: 3*4=12.\nStep 2: 12+1=13.", 0),
        ("13", "Step 1: 3*4=12.\nStep 2: 12+1=13.", 1),
        ("18", "first 18, then 10", 0),
        ("(2,3)", "The point is (2,3).", 1),
        ("(2,3)", "The point is $(3,2)$.", 0),
        (r"\frac{1}{2}", r"So the probability is $\frac{1}{2}$.", 1),
        (r"\sec^2 x", r"Hence the derivative is \(\sec^2 x\).", 1),
        ("n!", "So we get $n!$.", 1),
        ("5 m", "The pool is therefore 5 km long.", 0),
        ("3:30 PM", "The train arrives at 3:30 PM on Monday.", 1),
        ("July 4", "It is celebrated on the 4th of July.", 1),
        ("Paris", "The capital of France is Paris.", 1),
        ("Paris", "The capital of France is not Paris.", 0),
        ("B", "A is wrong. B is right. Therefore, B.", 1),
        ("B", "A) 3 B) 4 C) 5. The answer is C.", 0),
    ],
    "words around it": [
        ("100", "<answer>about 100</answer>", 1),
        ("100", "<answer>not 100</answer>", 0),
        ("100", "<answer>100 or 200</answer>", 0),
        ("100", "<answer>between 100 and 200</answer>", 0),
        ("100", "<answer>100-200</answer>", 0),
        ("100", "<answer>100 or more</answer>", 0),
        ("100", "<answer>less than 100</answer>", 0),
        ("3 apples and 2 pears", "<answer>3 pears and 2 apples</answer>", 0),
        ("3 apples and 2 pears", "<answer>2 pears and 3 apples</answer>", 1),
        ("3 apples and 2 pears", "<answer>3 and 2</answer>", 1),
        ("Tom 7, Ann 5", "<answer>Tom 5, Ann 7</answer>", 0),
        ("Tom: 7, Ann: 5", "<answer>Ann: 5, Tom: 7</answer>", 1),
        ("January 1", "<answer>1</answer>", 0),
        ("£5", "<answer>5 pounds</answer>", 1),
        ("5", "<answer>5:1</answer>", 1),
        *(("5", f"<answer>{other}</answer>", 0) for other in (
            "5!", "5x", "5i", "5π", "5 million", "x>5", "≥5", "x≠5", "A5", "x5", "55", "5 5", "5, 6", "5 and 5",
            "2x = 5", "5 = 6", "5~6", "5^2", r"\frac{5}{}", "x^2 + y^2 = 5")),
        *(("5", f"<answer>{same}</answer>", 1) for same in (
            "≈5", "[5]", "(5)", "{5}", "5.", "5...", "5th", "|−5|", "5%", "$5 a day")),
        ("$5", "<answer>$5 per day</answer>", 1),
        ("$5 per day", "<answer>5 dollars</answer>", 1),
        ("$5 per day", "<answer>5 dollars an hour</answer>", 0),
        ("x^2 + y^2 = 5", "<answer>5</answer>", 0),
        ("x + y = 5", "<answer>5</answer>", 1),
    ],
    # TRL's and Open R1's own test inputs, and their kin.
    "no verdict": [
        ("Answer is forty two.", "Answer is forty two.", None),
        ("Answer is forty three.", r"Some other content. \boxed{43}.", None),
        ("forty two", r"<think> Reasoning content </think> \boxed{42}", None),
        ("The cat sat on the mat.", "The cat sat on the mat.", None),
        ("Yes and no", "Yes", None),
        ("", "3", None),
        ("???", "3", None),
        (r"n\equiv 3 \pmod 5", "n = 8", None),
        (r"n\equiv 3 \pmod{5}", r"\boxed{n\equiv 3 \pmod{5}}", 1),
    ],
    "TRL and Open R1": [
        (r"\frac{63}{400}", r"\boxed{\frac{63}{400}}", 1),
        ("63/400", r"\boxed{\frac{63}{400}}", 1),
        (r"\frac{63}{400}", r"\boxed{\frac{64}{400}}", 0),
        ("6", r"\boxed{3}", 0),
        (r"\frac{63}{400}", r"<think> Reasoning content </think> \boxed{\frac{64}{400}}", 0),
        (r"\boxed{42}", r"<think> My answer is \boxed{42} </think> Some other text.", 0),
        (r"\boxed{42}", r"<think> The answer is \boxed{42} </think> Here's a wrong answer: \boxed{43}.", 0),
        (r"\frac{63}{400}", "<think> Incomplete reasoning without closing tag", 0),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", REPLIES)
def test_where_the_answer_stands(kind):
    references, replies, rewards = zip(*REPLIES[kind])
    given = accuracy([[{"role": "assistant", "content": reply}] for reply in replies], answer=references)
    assert [row for row, reward in zip(REPLIES[kind], given) if reward != row[2]] == []
    assert given == accuracy(replies, answer=references) == [None if r is None else float(r) for r in rewards]


@pytest.mark.parametrize(
    ("reference", "reply"),
    [
        (18, "18"),
        (0.5, r"\frac12"),
        (True, "True"),
        ("Half of 48 is <<48/2=24>>24, and 48+24=72.\n#### 72", "#### 72"),
        (r"First 7 is seen. So the answer is \boxed{8}.", "8"),
        ("<think>7?</think><answer>8</answer>", "8"),
        ("Yes, because 3 > 2.", "yes"),
        ("He has 18 apples left.", "18"),
    ],
)
def test_what_a_reference_may_be(reference, reply):
    assert accuracy([reply, "The answer is 17."], answer=[reference] * 2) == [1.0, 0.0]
