r"""How small models end a solution whose answer is 72, and the like endings of a wrong one."""

from __future__ import annotations

import pytest

from lowvram_grpo.rewards.maths import accuracy

# Each is right for 72; with 74 in its place it is wrong, and so are its steps 48, 24 and 2.
ENDINGS = {
    "chains of equations": r"""
        48/2 = 24, 48+24 = 72
        So 48/2 = 24, 48+24 = 72 clips
        48 / 2 = 24, so 48 + 24 = 72.
        48/2=24; 48+24=72
        48/2=24 48+24=72
        48/2=24⏎48+24=72
        48/2 = 24. 48+24 = 72.
        48/2=24 clips, 48+24=72 clips.
        So, 48/2 = 24 and 48 + 24 = 72
        48 + 24 = 72, so she sold 72.
        In May she sold 48/2 = 24 clips, making a total of 48+24 = 72 clips.
        The answer is 48/2 = 24, 48+24 = 72.
        Answer: 48/2=24; 24+48=72 clips
        48 ÷ 2 = 24 → 48 + 24 = 72
        48/2 = 24 => 48 + 24 = 72
        48 -> 24 -> 72
        $48/2 = 24$, $48+24 = 72$
        So $48/2 = 24$, and $48 + 24 = 72$ clips.
        $\frac{48}{2} = 24$, $48+24 = 72$ clips.
        \(48/2 = 24\), so \(48+24 = 72\).
        $$48/2 = 24$$ $$48+24=72$$
        48/2 = <<48/2=24>>24, 48+24 = <<48+24=72>>72
        Natalia sold 48+24 = <<48+24=72>>72 clips altogether in April and May.
        48÷2=24（个），48+24=72（个）
        5月卖了24个，所以一共卖了48 + 24 = 72个。
        48 plus 24 is 72
        48 + 24 is 72
        48 and 24 makes 72
        72 = 48 + 24
        So, she sold 72 = 48 + 24 clips.
    """,
    "what the result is for": """
        So she sold 48+24 = 72 clips in 2 months.
        Hence, she sold 48 clips + 24 clips = 72 clips in 2 months.
        48+24 = 72 clips in 2 months
        So there are 96 - 24 = 72 seats left on the bus after 2 stops.
        It will take 144/2 = 72 minutes to read 48 pages.
    """,
    "lists and tables": """
        - April: 48⏎- May: 24⏎- Total: 72
        1. April: 48⏎2. May: 48/2 = 24⏎3. Total: 48 + 24 = 72
        | Month | Clips |⏎|---|---|⏎| May | 24 |⏎| **Total** | **72** |
        April = 48, May = 24, Total = 72
        April: 48 clips, May: 24 clips, total: 72 clips
        72 clips: 48 in April and 24 in May.
        72 clips, i.e., 48 in April and 24 in May.
        The total is 72 clips, 48 in April and 24 in May.
        答：4月和5月一共卖了72个发夹。
    """,
    "remarks": """
        72 clips (48 in April and 24 in May)
        She sold 72 clips (48 in April and 24 in May).
        She sold a total of 72 clips (48 + 24 = 72).
        72 clips (48 + 24)
        Answer: 72 (48 + 24)
        Final Answer: $72 ($48 + $24)
        72 (rounded)
        72个（4月48个，5月24个）
        72 in total, since 48+24=72
        She sold 72 more clips than her 48 friends because 48 + 24 = 72
    """,
    "courtesies": """
        It is 72. Let me know if you have 2 more questions!
        The answer is 72. Let me know if you have 2 more questions!
        It is 72.⏎⏎I hope this helps you with all 2 questions!
        It is 72. Feel free to ask 2 more questions.
        It is 72. Good luck with the other 2 problems!
        It is 72. If you have any questions about step 2, please ask.
        It is 72. Do you have 2 more questions?
        It is $72$. I hope this helps with 2!
        所以，一共卖了72个。希望这2步对你有帮助！
        所以，一共卖了72个。如果你还有2个问题，请告诉我。
    """,
    "signs behind and before": """
        It's 72!
        72 🎉
        Hence the total: 48+24 = 72 ✅
        72</s>
        The answer is 72<|im_end|>
        72<|endoftext|>
        ≈72
        =72
        $72 total
        Final Answer: ⏎72
        Ans: 72
        So the total is 48 + 24 = **72**.
    """,
}
ROWS = [(kind, line.strip().replace("⏎", "\n")) for kind, text in ENDINGS.items() for line in text.strip().splitlines()]

# (reply, reference, reward)
NEIGHBOURS = [
    ("48+24 = 72, so she sold 73.", "72", 0),
    ("48+24 = 72 or 73", "72", 0),
    ("48+24=72 or 48+25=73", "73", 0),
    ("73 = 48 + 24", "72", 0),
    ("5, 2+4 = 6", "6", 0),
    ("x = 2+2 = 4, y = 3+3 = 6", "6", 0),
    ("48/2 = 24, 48+24 = 72", "24, 72", 1),
    ("2x = 10, so x = 5", "5", 1),
    ("<answer>2x + 3 = 13\n2x = 10\nx = 5</answer>", "5", 1),
    ("<answer>2x + 3 = 13\n2x = 10\nx = 6</answer>", "5", 0),
    ("x = 4, x = 6", "6", 0),
    ("He had 72 clips, sold 48 and has 24 left", "72", 0),
    ("He had 72 clips, sold 48 and has 24 left", "24", 1),
    ("3 boxes: 48 clips, 24 pins", "3", 0),
    ("3/4 - 1/4 = 1/2, 1/2 * 3 = 3/2", "1.5", 1),
    ("3/4 - 1/4 = 1/2, 1/2 * 3 = 5/2", "1.5", 0),
    ("80,000 + 50,000 = 130,000, 200,000 - 130,000 = $70,000", "70000", 1),
    ("80,000 + 50,000 = 130,000, 200,000 - 130,000 = $60,000", "70000", 0),
    ("5*4 = 20, 20/2 = 10 m", "10 cm", 0),
    ("C (since 3*4=12)", "C", 1),
    ("B (since 3*4=12, not C)", "C", 0),
    ("x → 0", "0", 0),
    ("72 clips (or 73)", "72", 0),
    ("72 (no, 73)", "72", 0),
    ("72 (73)", "72", 0),
    ("72 (wait, 48 + 25 = 73)", "72", 0),
    ("72 (it should be 73)", "72", 0),
    ("73 clips (72 with a discount)", "72", 0),
    ("50 (25 + 26)", "50", 0),
    ("2 (3 + 4)", "14", 1),
    ("If he spends 1/3 at each of the 3 speeds, he averages (60+72+42)/3 = 58 mph.", "58", 1),
    ("If 80% flower, there are (80/100)*35=28 plants with flowers.", "28", 1),
    ("If 80% flower, there are (80/100)*35=29 plants with flowers.", "28", 0),
    ("101 (base 2)", "101_2", 1),
    ("So he walks 2*3 = 6 miles in 2 hours and 12 miles in 4 hours", "6", 0),
    ("So he walks 3*2 = 6 miles in 2 hours so 3 miles per hour", "3", 1),
    ("Adding 5+3 = 8 to 10 gives him 18 apples", "8", 0),
    ("We take 3*4 = 12 from 50 and he has 38 left", "12", 0),
    ("He has 100 - 20 = 80 dollars, and half of it is 40", "80", 0),
    ("The total of 48 and 24 is 72 clips in the end", "48", 0),
    ("The total of 48 and 24 is 72 clips in the end", "72", 1),
    ("Total cost of 3 apples is 72 dollars, I think", "3", 0),
    ("一共有3个人，每人24个，所以是72个。", "3", 0),
    ("He has 5. Thanks to his mother he has 72 apples.", "5", 0),
    ("He has 5. Any other person pays 72.", "5", 0),
    ("He has 5. I hope that she has 72.", "5", 0),
    ("He has 5. If you need help from 3 friends each does 72.", "5", 0),
    ("他有5个。加油站卖了72升。", "5", 0),
    ("他有5个。希望小学有72人。", "5", 0),
    ("他有5个。还有72道问题没做。", "5", 0),
    ("I hope it is 72.", "72", 1),
    ("I hope this helps!", "72", 0),
    ("(B)\n\nI hope this helps!", "B", 1),
    ("A. Feel free to ask about B.", "B", 0),
    ("He needs 160 because 480 / 30 = 16", "16", 0),
    ("5!", "5", 0),
    ("$5!$", "120", 1),
]
LEAD_INS = ["选B", "选：B", "故选B。", "本题选B", "选择B", "选项B", "B选项", "答案:B", "答案选B",
            "正确答案是B", "Answer: B", "Answer: (B)", "ans: B",
            "The answer is B.", "The correct option is B", "Option B"]  # fmt: skip


@pytest.mark.parametrize("kind", ENDINGS)
def test_the_last_result_is_the_answer(kind):
    replies = [reply for of, reply in ROWS if of == kind]
    for form in ("{}", "<answer>{}</answer>"):
        given = accuracy([form.format(reply) for reply in replies], answer=["72"] * len(replies))
        assert [reply for reply, reward in zip(replies, given) if reward != 1] == []


@pytest.mark.parametrize("kind", ENDINGS)
def test_neither_a_wrong_one_nor_a_step_is(kind):
    replies = [reply for of, reply in ROWS if of == kind]
    wrong = [(reply.replace("72", "74"), "72") for reply in replies]
    wrong += [(reply, step) for reply in replies for step in ("48", "24", "2")]
    given = accuracy([reply for reply, _ in wrong], answer=[reference for _, reference in wrong])
    assert [row for row, reward in zip(wrong, given) if reward != 0] == []


def test_what_looks_alike_is_told_apart():
    replies, references, rewards = zip(*NEIGHBOURS)
    given = accuracy(replies, answer=references)
    assert [row for row, reward in zip(NEIGHBOURS, given) if reward != row[2]] == []
    assert given == [float(reward) for reward in rewards]


@pytest.mark.parametrize("reference", LEAD_INS)
def test_a_reference_is_what_it_announces(reference):
    assert accuracy(["B", "<answer>B</answer>", "C", "So the answer is A."], answer=[reference] * 4) == [1, 1, 0, 0]


@pytest.mark.parametrize("reference", ["The answer is 42", "Answer: 42", "答案：42", "答：42", "Ans: 42"])
def test_a_number_that_a_reference_announces(reference):
    assert accuracy(["42", "So 42 clips.", "43"], answer=[reference] * 3) == [1, 1, 0]


def test_a_word_that_a_reference_announces():
    assert accuracy(["是", "否"], answer=["答案：是"] * 2) == [1, 0]
    assert accuracy(["Yes", "No"], answer=["Answer: Yes"] * 2) == [1, 0]
