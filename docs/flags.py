"""Print the flags of all scripts as Markdown: python docs/flags.py > docs/flags.md, or make docs."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.flags import groups
from export import ExportConfig
from generate import GenerateConfig
from perplexity import PerplexityConfig
from train import Config

HEAD = """# Flags

`make docs` makes this page from the flags of each script; `--help` shows the same. Every script also takes
`--config FILE.yaml`, a YAML file of these flags. A flag wins over the file, and the file wins over the default."""


def flags_table(kind: type) -> str:
    """Return one Markdown table per group of ``kind``'s flags, in the order of --help."""
    lines = []
    for group in groups(kind):
        lines += ["", f"### {group._argument_group_name}", "", "| flag | default | meaning |", "| --- | --- | --- |"]
        for field in dataclasses.fields(group):
            meaning = field.metadata["help"].replace("%%", "%").replace("|", "\\|").replace("<", "\\<")
            if get_origin(field.type) is Literal:
                meaning += "; one of " + ", ".join(f"`{choice}`" for choice in get_args(field.type))
            lines.append(f"| `--{field.name}` | {_shown(field)} | {meaning} |")
    return "\n".join(lines)


def _shown(field: dataclasses.Field) -> str:
    """Return the default as a command would write it, or an empty string if there is none."""
    default: Any = field.default_factory() if field.default is dataclasses.MISSING else field.default
    if isinstance(default, bool):
        return "on" if default else "off"
    if default is None or default == []:
        return ""
    return f"`{default:g}`" if isinstance(default, float) else f"`{default!r}`" if default == " " else f"`{default}`"


if __name__ == "__main__":
    print(HEAD)
    scripts = {"train": Config, "generate": GenerateConfig, "perplexity": PerplexityConfig, "export": ExportConfig}
    for name, kind in scripts.items():
        print(f"\n## {name}.py\n{flags_table(kind)}")
