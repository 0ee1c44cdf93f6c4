"""Write docs/flags.md: python docs/flags.py > docs/flags.md, or make docs."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli.flags import groups
from export import ExportConfig
from generate import GenerateConfig
from perplexity import PerplexityConfig
from train import Config

KINDS = {
    "train.py": Config,
    "generate.py": GenerateConfig,
    "perplexity.py": PerplexityConfig,
    "export.py": ExportConfig,
}
HEAD = """# Flags

`make docs` writes this page from the dataclasses of the scripts. `--help` of a script prints the same.

Defaults < `--config FILE.yaml` < flags. All scripts take `--config`, a YAML file of their flags.
"""


def shown(default: Any) -> str:
    """Return a default as a person would type it. A flag without a value is off, and an absent default is empty."""
    if default is dataclasses.MISSING or default is None or default == []:
        return ""
    if isinstance(default, bool):
        return "on" if default else "off"
    text = f"{default:g}" if isinstance(default, float) else str(default)
    return f"`{text!r}`" if text != text.strip() else f"`{text}`"


def page() -> str:
    """Return the text of docs/flags.md: for each script, one table per group of flags, as in --help."""
    lines = [HEAD]
    for script, kind in KINDS.items():
        lines.append(f"## {script}\n")
        for group in groups(kind):
            lines += [f"### {group._argument_group_name}\n", "| flag | default | meaning |", "| --- | --- | --- |"]
            for field in dataclasses.fields(group):
                help = field.metadata["help"].replace("%%", "%").replace("|", "\\|")
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                lines.append(f"| `--{field.name}` | {shown(default)} | {help} |")
            lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


if __name__ == "__main__":
    print(page(), end="")
