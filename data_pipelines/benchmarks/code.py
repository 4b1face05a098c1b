"""Programs, whose tests are run elsewhere: HumanEval, MBPP.

The reference is the owner's solution. Replies are scored by running them, which is not done here:
the export's key has the row's number.
"""

from __future__ import annotations

from data_pipelines.benchmarks.base import Question, Row

COMPLETE = "Complete this Python function. Reply with the whole program alone.\n\n{program}"
WRITE = "{task} Reply with the Python program alone. It must pass these tests:\n\n{tests}"


def humaneval(row: Row) -> Question:
    """`task_id`, `prompt`, `canonical_solution`, `test`, `entry_point`."""
    facts = {name: row.text(name) for name in ("task_id", "test", "entry_point")}
    asked = COMPLETE.format(program=row.text("prompt"))
    # The solution begins inside the function: its indent belongs to it.
    row.text("canonical_solution")
    return Question([asked], [row.get("canonical_solution").rstrip()], facts=facts)


def mbpp(row: Row) -> Question:
    """`task_id`, `text`, `code`, `test_list`: the full configuration."""
    tests = row.texts("test_list")
    asked = WRITE.format(task=row.text("text"), tests="\n".join(tests))
    return Question([asked], [row.text("code")], facts={"task_id": row.text("task_id")})
