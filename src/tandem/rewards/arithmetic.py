"""Arithmetic on whole numbers in exact fractions, by a parser of our own instead of `eval`: for Countdown."""

from fractions import Fraction

MAX_LENGTH = 1000
MAX_DEPTH = 50
_ALLOWED = frozenset("0123456789+-*/() ")


class _Parser:
    """Recursive descent: sum := product ((+|-) product)*; product := factor ((*|/) factor)*."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.place = 0
        self.depth = 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        while self.place < len(self.text) and self.text[self.place] == " ":
            self.place += 1
        return self.text[self.place : self.place + 1]

    def sum(self) -> Fraction:
        value = self.product()
        while (sign := self.peek()) and sign in "+-":
            self.place += 1
            right = self.product()
            value = value + right if sign == "+" else value - right
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while (sign := self.peek()) and sign in "*/":
            self.place += 1
            right = self.factor()
            value = value * right if sign == "*" else value / right
        return value

    def factor(self) -> Fraction:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ValueError("nested too deep")
        sign = self.peek()
        if sign and sign in "+-":
            self.place += 1
            value = self.factor() if sign == "+" else -self.factor()
        elif sign == "(":
            self.place += 1
            value = self.sum()
            if self.peek() != ")":
                raise ValueError("unclosed bracket")
            self.place += 1
        else:
            value = self.whole()
        self.depth -= 1
        return value

    def whole(self) -> Fraction:
        start = self.place
        while self.place < len(self.text) and self.text[self.place].isdigit():
            self.place += 1
        self.numbers.append(int(self.text[start : self.place]))
        return Fraction(self.numbers[-1])


def evaluate(text: str) -> tuple[Fraction, list[int]] | None:
    """Value of the expression and the numbers it uses; None if it is not an expression or divides by zero."""
    if len(text) > MAX_LENGTH or not _ALLOWED.issuperset(text):
        return None
    parser = _Parser(text)
    try:
        value = parser.sum()
    except (ValueError, ZeroDivisionError):
        return None
    return None if parser.peek() else (value, parser.numbers)
