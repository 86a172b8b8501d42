r"""One way of writing for each of the many that people and models have: Markdown, Unicode and plain text become LaTeX.

`normalize` changes how an answer is written, never what it says: `**1,234**` is `1234`, `√2/2` is `\sqrt{2}/2`, `\$5`
is `¤5`. What it returns is compared as text, taken apart into numbers and words, or given to math-verify.
"""

from __future__ import annotations

import re
from functools import lru_cache

# Stands for the dollar, whose sign also opens and closes formulas.
DOLLAR = "¤"

FUNCTIONS = (
    "arcsin", "arccos", "arctan", "arccot", "arcsec", "arccsc", "asin", "acos", "atan", "sinh", "cosh", "tanh", "sin",
    "cos", "tan", "cot", "sec", "csc", "log", "ln", "lg", "exp", "max", "min", "gcd", "lcm", "det",
)  # fmt: skip
_LATEX_NAMES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}

_CHARACTERS = str.maketrans(
    {
        "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
        "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "π": r"\pi ", "∞": r"\infty ", "≤": r"\leq ", "≥": r"\geq ",
        "⩽": r"\leq ", "⩾": r"\geq ", "≠": r"\neq ", "≈": r"\approx ", "±": r"\pm ", "∪": r"\cup ", "∩": r"\cap ",
        "∈": r"\in ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}",
        "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "°": r"^\circ ", "º": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F",
        "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ",
        "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\varphi ", "ω": r"\omega ", "Δ": r"\Delta ", "∆": r"\Delta ",
        "…": r"\ldots ", "∶": ":", "→": r"\to ", "⟨": r"\langle ", "⟩": r"\rangle ", "，": ", ", "。": ". ", "：": ": ",
        "；": "; ", "、": ", ", "？": "? ", "！": "! ", "“": '"', "”": '"', "‘": "'", "’": "'",
        "＄": "$", "￥": "¥", "～": "~",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2002": " ", "\u2003": " ", "\u3000": " ", "\u200b": "",
        "\u2061": "", "\ufeff": "",
        **{chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) not in "，：；？！～＄"},
        **{sign: rf"\frac{{{n}}}{{{d}}}" for sign, n, d in (
            ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5), ("⅗", 3, 5),
            ("⅘", 4, 5), ("⅙", 1, 6), ("⅚", 5, 6), ("⅐", 1, 7), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8),
            ("⅑", 1, 9), ("⅒", 1, 10))},
    }
)  # fmt: skip
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱˣ", "0123456789+-()nix"))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎ₙₓ", "0123456789+-()nx"))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_LOWERED_RUN = re.compile(f"[{''.join(_LOWERED)}]+")

_FENCE = re.compile(r"```[a-zA-Z]*\n?|`")
# Emphasis touches no digit, letter or bracket on its outer side: `2**3**2` is a power.
_EMPHASIS = re.compile(
    r"(?<![\w)\]}*])(\*{2,3})(?=[^\s*])(.+?)(?<=[^\s*])\1(?!\*)"
    r"|(?<![\w)\]}*])(\*)(?=[^\s*])([^*]+?)(?<=\S)\*(?![\w(\[{*])"
    r"|(?<![\w)\]}])(__|_)(?=[^\s_{])([^_]+?)(?<=\S)\5(?![\w(\[{])",
    re.DOTALL,
)
_LINE_MARK = re.compile(r"^[ \t]*(?:#{1,6}|>|[*•])[ \t]+", re.MULTILINE)
# Pandoc's rule for a dollar that closes a formula: no space before it, no digit behind it.
_FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(?=[^\s$])([^$]*?[^\s$\\])\$(?!\d)", re.DOTALL)
_SPACING = re.compile(r"(?<!\\)\\(?:[,;:> ]|quad\b|qquad\b|enspace\b|thinspace\b|hspace\{[^}]*\})|~")
_LAYOUT = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|strut|phantom\{[^{}]*\})"
    r"(?![A-Za-z])\s*\.?(?=[^\d]|$)"
)
_UNWRAPPED = re.compile(
    r"\\(?:text|textbf|textit|textrm|textsf|textnormal|mathrm|mathbf|mathit|mathsf|mbox|hbox|bm|boldsymbol|"
    r"operatorname\*?|underline|boxed|fbox|emph|texttt)\s*\{([^{}]*)\}"
)
_COMMANDS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:le|leqslant)(?![A-Za-z])"), r"\\leq"),
    (re.compile(r"\\(?:ge|geqslant)(?![A-Za-z])"), r"\\geq"),
    (re.compile(r"\\ne(?![A-Za-z])"), r"\\neq"),
    (re.compile(r"\\(?:cdotp|ast|bullet)(?![A-Za-z])"), r"\\cdot"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lvert|rvert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\(?:degree|deg)(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}"), r"^\\circ "),
    (re.compile(r"\\dots(?![A-Za-z])"), r"\\ldots"),
    (re.compile(r"\\(?:euro|texteuro)(?![A-Za-z])"), "€"),
    (re.compile(r"\\pounds(?![A-Za-z])"), "£"),
    (re.compile(r"\{\s*(\w+)\s*\\choose\s*(\w+)\s*\}"), r"\\binom{\1}{\2}"),
)
_PLAIN = (
    (re.compile(r"<="), r"\\leq "),
    (re.compile(r">="), r"\\geq "),
    (re.compile(r"!="), r"\\neq "),
    (re.compile(r"\+/-"), r"\\pm "),
    (re.compile(r"(?<![A-Za-z\\])infinity(?![A-Za-z])|(?<![A-Za-z\\])inf(?![A-Za-z])"), r"\\infty"),
    # Not the word of a sentence.
    (
        re.compile(r"(?:^|(?<=[\d*/+(=^{,-])|(?<=[\d*/+(=^{,-] ))pi(?![A-Za-z])|(?<![A-Za-z\\])pi(?=\s*[*/+^)=}-])"),
        r"\\pi ",
    ),
    (re.compile(rf"(?<=\d)\s*[xX]\s*(?={DOLLAR}?\d)"), r"\\times "),
    (re.compile(r"(?i)\bper\s?cent\b|\bpercentage\b|\bpct\b|百分号"), "%"),
    (re.compile(r"(?<=[0-9A-Fa-f)])\s*(?:\(|in )?\s*base[ -](\d+|[a-z]+)\)?"), r"_{\1}"),
    (re.compile(r"(?<=\d)(?:\^\{?)?\s?(?<![A-Za-z])(?:st|nd|rd|th)(?![A-Za-z])(?:\s*\})?"), ""),
    (re.compile(rf"(?<![A-Za-z])(?:USD\s*{DOLLAR}?|US\s*{DOLLAR})\s*(?=\d)"), DOLLAR),
    (re.compile(r"(?<=\d)\s*:\s*(?=\d)"), ":"),
    (re.compile(r"百分之\s*(\d+(?:\.\d+)?)"), r"\1%"),
    (re.compile(r"(\d+)\s+choose\s+(\d+)"), r"\\binom{\1}{\2}"),
)
_SCIENTIFIC = re.compile(r"(?<![A-Za-z\d_])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![A-Za-z\d])")
_TIMES_TEN = re.compile(r"(?<=\d)\s*(?:\*|\\cdot\b|\\times\b)\s*10\s*(?:\^|\*\*)\s*\{?\s*([+-]?\d+)\s*\}?")
_POWER = re.compile(r"\*\*|\^\s*(?=[+-]?\d)")
_EXPONENT = re.compile(r"\^\s*([+-]?\d+)(?!\d)")
_ARGUMENT = r"(?:\{([^{}]*)\}|(\d|[A-Za-z](?![A-Za-z])|\\pi(?![A-Za-z])))"
_SHORT = re.compile(rf"\\(frac|binom)\s*{_ARGUMENT}\s*{_ARGUMENT}")
# Before an argument: "8 logs", "a tank", "5 sec of" and "10 min walk" are words of a sentence.
_FUNCTION = re.compile(
    rf"(?<![\\A-Za-z])(?<!\d )({'|'.join(FUNCTIONS)})"
    r"(?=\s*[({^_\d\\]|[xy](?![A-Za-z])|\s+[b-z](?![A-Za-z]))(?!(?<=max|min|gcd|lcm|det)\s*[^\s({])"
)
_ROOT = re.compile(r"\\?(?<![A-Za-z])(sqrt|cbrt)\s*(?=[(\d])|([√∛])\s*")
_SIMPLE = re.compile(r"\d+(?:\.\d+)?|[A-Za-z]|\\[A-Za-z]+")
_SCRIPT_PARENTHESES = re.compile(r"\^\s*\(")
_ABSOLUTE = re.compile(r"(?<![A-Za-z\\])abs\(([^()]*)\)")

_GROUP = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d]|,\d)(?:\.\d+)?|(?<![\d.,])\d{1,2}(?:,\d{2})+,\d{3}(?![\d,])")
_SPACED_GROUP = re.compile(r"(?<![\d.,\\/^_{])\d{1,3}(?:([ '_])\d{3})(?:\1\d{3})*(?![\d/,]|\.\d{3}\b| \d)")
_EUROPEAN = re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3})+,\d+(?![\d.,]\d)|(?<![\d.,])\d{1,3}(?:\.\d{3}){2,}(?![\d.,]\d)")
_THIN = re.compile(r"(?<=\d)(?:\\[,;: ]|\\!|\{,\}|,\\!|~|[\u2009\u202f\u00a0])(?=\d{3}(?!\d))")
# A line ends an item of a list, unless an operator or a bracket leads on.
_LINES = re.compile(r"(?<=[^\s,;:=+\-*/(\[{&\\])\s*\n\s*(?=[^\s=+*/)\]}])")
_BARE = re.compile(r"-?\d+(?:\.\d+)?")
_END = re.compile(r"(?:[\s.,;:?\"']|(?<=[^\W\d_]{2})!)+$")


@lru_cache(maxsize=4096)
def normalize(text: str) -> str:
    """The answer `text` in one notation: LaTeX commands, one space between words, no delimiters, no Markdown."""
    if _BARE.fullmatch(text):
        return text
    text = strip_markdown(text)
    text = _THIN.sub("", text.replace(r"\!", ""))
    if "$" in text:
        text = text.replace(r"\$", DOLLAR)
        text = _FORMULA.sub(lambda m: f" {m.group(1) or m.group(2)} ", text).replace("$", DOLLAR)
    text = re.sub(r"\\[()\[\]]", " ", text).strip()
    if "\n" in text and r"\begin" not in text:
        text = _LINES.sub(", ", text)
    if not text.isascii():
        text = _RAISED_RUN.sub(lambda m: "^{" + "".join(_RAISED[ch] for ch in m.group()) + "}", text)
        text = _LOWERED_RUN.sub(lambda m: "_{" + "".join(_LOWERED[ch] for ch in m.group()) + "}", text)
        text = text.translate(_CHARACTERS)
    text = _SPACING.sub(" ", text).replace("{,}", ",")
    if "\\" in text:
        text = _unwrap(_LAYOUT.sub("", text).replace(r"\%", "%").replace(r"\#", "#"))
        for pattern, name in _COMMANDS:
            text = pattern.sub(name, text)
    for pattern, name in _PLAIN:
        text = pattern.sub(name, text)
    text = _functions(text)
    text = _join_digits(text)
    return _tidy(text)


def strip_markdown(text: str) -> str:
    """`text` without emphasis, code ticks, headings, quotes and bullets."""
    if "`" in text:
        text = _FENCE.sub("", text)
    if "*" in text or "_" in text:
        for _ in range(3):
            stripped = _EMPHASIS.sub(lambda m: m.group(2) or m.group(4) or m.group(6), text)
            if stripped == text:
                break
            text = stripped
    return _LINE_MARK.sub("", text).strip().removeprefix("**").removesuffix("**")


def same_text(first: str, second: str) -> bool:
    """Whether two normalized answers are written alike, but for spaces and the sign of a product."""
    return bool(first) and _key(first) == _key(second)


@lru_cache(maxsize=4096)
def _key(text: str) -> str:
    text = re.sub(r"\\(?:cdot|times)(?![A-Za-z])", "*", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", text)
    return re.sub(r"([\^_])\{(\w)\}", r"\1\2", text).strip()


def _unwrap(text: str) -> str:
    """Words out of `\text{...}` and its like, formulas out of `\boxed{...}`."""
    for _ in range(4):
        unwrapped = _UNWRAPPED.sub(r" \1 ", text)
        if unwrapped == text:
            break
        text = unwrapped
    return text


def _functions(text: str) -> str:
    text = _ABSOLUTE.sub(r"|\1|", text)
    text = _roots(text)
    text = _FUNCTION.sub(lambda m: "\\" + _LATEX_NAMES.get(m.group(1), m.group(1)) + " ", text)
    text = _SCIENTIFIC.sub(lambda m: rf"{m.group(1)}\times 10^{{{int(m.group(2))}}}", text)
    text = _TIMES_TEN.sub(lambda m: rf"\times 10^{{{int(m.group(1))}}}", text)
    text = _POWER.sub("^", text)
    text = _EXPONENT.sub(r"^{\1}", text)
    while (at := _SCRIPT_PARENTHESES.search(text)) and (end := closing(text, at.end() - 1)):
        text = f"{text[: at.start()]}^{{{text[at.end() : end]}}}{text[end + 1 :]}"
    return _SHORT.sub(lambda m: rf"\{m[1]}{{{m[2] or m[3]}}}{{{m[4] or m[5]}}}", text)


def _roots(text: str) -> str:
    r"""`sqrt(2)`, `\sqrt(2)`, `√2` and `√(x+1)` as `\sqrt{...}`."""
    start = 0
    while at := _ROOT.search(text, start):
        command = r"\sqrt[3]" if (at.group(1) or at.group(2)) in ("cbrt", "∛") else r"\sqrt"
        rest = at.end()
        if text[rest : rest + 1] in ("(", "{") and (end := closing(text, rest)):
            inner, rest = text[rest + 1 : end], end + 1
        elif simple := _SIMPLE.match(text, rest):
            inner, rest = simple.group(), simple.end()
        else:
            return text
        text = f"{text[: at.start()]}{command}{{{inner}}}{text[rest:]}"
        start = at.start() + len(command)
    return text


def closing(text: str, start: int) -> int | None:
    """Index of the bracket that closes the one at `start`, None where none does."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return None


def _join_digits(text: str) -> str:
    """Thousands without separators. Commas within brackets stay: `(100,200)` is a point."""
    text = _EUROPEAN.sub(lambda m: m.group().replace(".", "").replace(",", "."), text)
    text = _SPACED_GROUP.sub(lambda m: re.sub("[ '_]", "", m.group()), text)
    pieces, depth, last = [], 0, 0
    for match in re.finditer(r"[(\[{]|[)\]}]", text):
        if depth == 0:
            pieces.append(_GROUP.sub(lambda m: m.group().replace(",", ""), text[last : match.start()]))
        else:
            pieces.append(text[last : match.start()])
        last = match.start()
        depth = depth + 1 if match.group() in "([{" else max(0, depth - 1)
    rest = text[last:]
    pieces.append(rest if depth else _GROUP.sub(lambda m: m.group().replace(",", ""), rest))
    return "".join(pieces)


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text).strip()
    # A unit's power stands outside of `\text{}`: `5\text{ cm}^2`.
    text = re.sub(r"\s+(?=[\^_])", "", text)
    text = text.strip("\"'* ")
    # `5!` is a factorial, `Yes!` is not.
    return _END.sub("", text).strip()
