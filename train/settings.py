"""fastargs settings, read strictly: flags, --config-file YAMLs -> one namespace per section. Read by both scripts.

fastargs itself ignores unknown keys of a config file and exits with status 0 on a bad value.
"""
import argparse
import math
import textwrap
from pathlib import Path
from types import SimpleNamespace

import yaml
from fastargs.exceptions import MissingValueError
from fastargs.validation import Checker

from mrl_files import InputError, describe_error, file_path


class FilePath(Checker):
    """A setting that is a path, ~ at its beginning the user's home."""

    def check(self, value):
        return file_path(value)

    def help(self):
        return "a path"


class Text(Checker):
    """A text. YAML may have a number or a list in its place: port: 12355, nesting_list: [8, 16]."""

    def check(self, value):
        if isinstance(value, bool) or not isinstance(value, str | int | float | list):
            raise TypeError
        return ",".join(map(str, value)) if isinstance(value, list) else str(value)

    def help(self):
        return "a text"


PATH, TEXT = FilePath(), Text()


def read_settings(config, description, defaults=None):
    """-> namespace of the config's sections (settings.lr.lr), None where nothing is set.

    The command line goes before the YAML files, they go before `defaults`.
    """
    config.content.clear()
    config.collect(defaults or {})
    files = {path: read_config(path, config) for path in read_flag("--config-file", "-C", action="append") or []}
    config.collect_config_file = lambda path: config.collect(files[path])      # fastargs' own follows the locale
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    config.augment_argparse(parser)
    parser.epilog = describe_settings(config)
    config.collect_argparse_args(parser)
    return as_namespaces(config)


def describe_settings(config):
    """-> the settings for --help, required sections first. (fastargs' own tables are wider than a terminal, and drawn
    with escape codes that a pager or a file shows as letters.)"""
    lines = ["settings, as flags (--lr.lr=0.5) or in a YAML file (lr: {lr: 0.5}):"]
    required = {section: any(config.entries[path].required for path in paths)
                for section, paths in config.sections_to_entries.items()}
    for section in sorted(required, key=required.get, reverse=True):
        lines += ["", config.sections[section].desc]
        lines += [describe_setting(path, config.entries[path]) for path in config.sections_to_entries[section]]
    return "\n".join(lines)


def describe_setting(path, param):
    default = " (required)" if param.required else "" if param.default is None else f"={param.default}"
    words = f"{param.desc} ({param.checker.help()})"
    return textwrap.fill(words, 100, initial_indent=f"  {'--' + '.'.join(path) + default:<33} ",
                         subsequent_indent=" " * 36)


def given_settings(config, values):
    """What `read_settings` returns, of a dictionary of sections: for other programs (benchmarks/)."""
    config.content.clear()
    config.collect(values)
    return as_namespaces(config)


def as_namespaces(config):
    """-> the namespaces, of values that are all as declared."""
    check_values(config)
    sections = {}
    for section, name in config.entries:
        sections.setdefault(section, {})[name] = config[section, name]
    return SimpleNamespace(**{name: SimpleNamespace(**values) for name, values in sections.items()})


def read_flag(*flag, **options):
    """-> the value of a flag that is needed before all settings are read; None where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*flag, dest="value", **options)
    return parser.parse_known_args()[0].value


def read_config(path, config):
    """-> the sections of a YAML (or JSON) file, over those of the one beside it that its `base:` names."""
    content, base = read_yaml(path), {}
    if isinstance(content, dict) and "base" in content:
        beside = Path(file_path(path)).parent / str(content.pop("base"))
        base = check_sections(beside, read_yaml(beside), config)
    content = check_sections(path, content, config)
    return {section: base.get(section, {}) | content.get(section, {}) for section in base | content}


def read_yaml(path):
    try:
        return yaml.safe_load(Path(file_path(path)).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:      # ValueError: not UTF-8; no such date
        raise InputError(f"{path}: not YAML ({describe_error(error)})") from None


def check_sections(path, content, config):
    """-> the content. InputError for a key that none declares."""
    if not isinstance(content, dict) or not all(isinstance(section, dict) for section in content.values()):
        raise InputError(f"{path}: expected sections of keys, as in rn50_configs/rn50_40_epochs.yaml")
    unknown = [f"{section}.{key}" for section in content for key in content[section]
               if (section, key) not in config.entries]
    if unknown:
        raise InputError(f"{path}: unknown setting {', '.join(unknown)}; --help lists them all")
    return content


def check_values(config):
    problems = []
    for path, error in config.validate(mode="errordict").items():
        name, given = ".".join(path), config.content.get(path)
        expected = config.entries[path].checker.help()
        wanted = "required" if isinstance(error, MissingValueError) else f"expected {expected}"
        problems.append(f"--{name}: {wanted}" if given is None else f"--{name}={given}: {wanted}")
    for path, given in () if problems else config.content.items():
        value = config[path]
        if isinstance(given, float) and value not in (given, str(given)):      # YAML's 1.5 for a whole number
            problems.append(f"--{'.'.join(path)}={given}: expected {config.entries[path].checker.help()}")
        elif isinstance(value, float) and not math.isfinite(value):
            problems.append(f"--{'.'.join(path)}={given}: expected a finite number")
    if problems:
        raise InputError("; ".join(problems))


def as_dict(settings):
    """The namespaces back as plain dictionaries, what is not set left out: for params.json."""
    return {section: {k: v for k, v in vars(values).items() if v is not None}
            for section, values in vars(settings).items()}
