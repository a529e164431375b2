"""What setup.sh asks Python: pip's configuration in uv's words, and what is installed."""
import ctypes
import runpy
from importlib import metadata

from conftest import FFCV, ROOT

import MRL

uv_settings = runpy.run_path(str(ROOT / "setup/uv_settings.py"))


def test_uv_looks_where_pip_looks():
    listed = r"""
:env:.find-links='/wheels'
:env:.default-timeout='180'
global.find-links='/elsewhere'
global.extra-index-url='\nfile:///a/simple\nhttps://me:word@b/simple'
global.index-url='https://c/simple'
install.index-url='https://d/simple'
install.no-deps='true'
""".strip()
    settings = uv_settings["pip_settings"](listed)
    assert settings["find-links"] == "/wheels" and settings["index-url"] == "https://d/simple"
    assert uv_settings["uv_variables"](settings) == {
        "UV_INDEX_STRATEGY": "unsafe-best-match", "UV_FIND_LINKS": "/wheels", "UV_HTTP_TIMEOUT": "180",
        "UV_INDEX": "file:///a/simple https://me:word@b/simple", "UV_DEFAULT_INDEX": "https://d/simple"}


def test_what_is_installed(capsys, monkeypatch):
    """FFCV whose libraries the system has lost is not installed."""
    runpy.run_path(str(ROOT / "setup/installed.py"), run_name="__main__")
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["torch"] == metadata.version("torch") and said["MRL"] == MRL.__file__
    assert said["ffcv"] == (metadata.version("ffcv") if FFCV else "-")

    def lost(path):
        raise OSError(f"{path}: libopencv_core.so.406: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", lost)
    runpy.run_path(str(ROOT / "setup/installed.py"), run_name="__main__")
    assert "\nffcv -\n" in capsys.readouterr().out


def test_an_unknown_section_of_pip_is_no_error():
    assert uv_settings["pip_settings"]("download.dest='x'\nglobal.cert='/c'") == {"cert": "/c"}
