"""The list of Ray's own tests that are left out."""

from __future__ import annotations

from ci.ray_tests import left_out, reason_for


def test_each_entry_is_a_test_or_a_file_and_has_a_reason() -> None:
    for entry, reason in left_out().items():
        assert entry.startswith("test_"), entry
        assert ".py" in entry, entry
        assert len(reason) > 5, entry


def test_parameters_and_classes_belong_to_their_entry() -> None:
    listed = {"test_a.py": "file", "test_b.py::test_one": "test", "test_b.py::test_two[1]": "one"}
    assert reason_for("test_a.py::TestIt::test_x", listed) == "file"
    assert reason_for("test_b.py::test_one[True-3]", listed) == "test"
    assert reason_for("test_b.py::test_one_more", listed) is None
    assert reason_for("test_b.py::test_two[1]", listed) == "one"
    assert reason_for("test_b.py::test_two[2]", listed) is None
