"""Mathematical answers are compared as mathematics."""

from __future__ import annotations

import threading

import pytest

from rollout.tasks.math import verify


@pytest.mark.parametrize(
    ("response", "truth", "expected"),
    [
        (r"so it is $\frac{2}{4}$", r"\frac{1}{2}", 1.0),
        (r"\boxed{0.5}", "1/2", 1.0),
        (r"\boxed{3}", r"3\sqrt{2}", 0.0),  # a bare truth is read as a whole, not up to its first number
        (r"\boxed{3\sqrt2}", r"3\sqrt{2}", 1.0),
        ("first 7, then the answer is 72", "She pays $12 and $60. #### 72", 1.0),
        ("The answer is 1,234.", 1234, 1.0),
        (r"\boxed{x+1}", r"\boxed{1+x}", 1.0),
        (r"$(1,2)$", "$(1,2)$", 1.0),
        (r"\boxed{\frac12}", [r"$\frac{1}{2}$"], 1.0),
        (r"\boxed{2, 1}", ["$1$", "$2$"], 1.0),
        (r"\boxed{1}", ["$1$", "$2$"], 0.0),
        ("I do not know", "42", 0.0),
        ("", "42", 0.0),
        (r"\boxed{\frac{", "42", 0.0),
        ("42", "", None),
        ("42", "#### ", None),
        ("42", "%%%", None),
        ("42", r"\sqrt{2", None),
    ],
)
def test_an_answer_is_right_wrong_or_beyond_judgement(response, truth, expected):
    assert verify(response, truth) == expected


def test_no_alarm_is_needed():
    # math-verify's own timeouts raise off the main thread.
    verdicts = []
    thread = threading.Thread(target=lambda: verdicts.append(verify(r"\boxed{2}", "2")))
    thread.start()
    thread.join()
    assert verdicts == [1.0]
