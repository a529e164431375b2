"""pip's configuration, which uv does not read, as lines for a shell: where packages come from, and how.

    eval "$(python setup/uv_settings.py)"

pip takes the best version of all its sources, so uv is told to do so too. A variable of uv's that is set stays.
"""
import ast
import os
import shlex
import subprocess
import sys

# pip's option: (uv's variable, what stands between several values)
VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "), "extra-index-url": ("UV_INDEX", " "), "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "), "trusted-host": ("UV_INSECURE_HOST", " "), "constraint": ("UV_CONSTRAINT", " "),
    "cert": ("SSL_CERT_FILE", " "), "client-cert": ("SSL_CLIENT_CERT", " "), "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "), "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}


def pip_settings(listed):
    """What `pip config list` prints -> {option: text}: PIP_ variables go before [install], that before [global]."""
    found = [line.partition("=") for line in listed.splitlines()]
    order = ["global", "install", ":env:"]
    found = [(key.rpartition("."), ast.literal_eval(value)) for key, _, value in found]
    found = [(order.index(section), name, value) for (section, _, name), value in found if section in order]
    return {name: value for _, name, value in sorted(found)}


def uv_variables(settings):
    """-> {variable: text} for uv."""
    shared = {VARIABLES[name][0]: VARIABLES[name][1].join(value.split()) for name, value in settings.items()
              if name in VARIABLES}
    return {"UV_INDEX_STRATEGY": "unsafe-best-match", **shared}


if __name__ == "__main__":
    done = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    for variable, text in uv_variables(pip_settings(done.stdout)).items():
        if variable not in os.environ:
            print(f"export {variable}={shlex.quote(text)}")
