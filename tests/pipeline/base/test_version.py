from __future__ import annotations

import pytest

from pipeline.base.version import VARIABLE, check_code_version, code_version


def test_same_code_passes_and_other_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, code_version())
    check_code_version()
    monkeypatch.setenv(VARIABLE, "0123456789ab")
    with pytest.raises(RuntimeError, match="driver 0123456789ab"):
        check_code_version()


def test_without_a_driver_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    check_code_version()
