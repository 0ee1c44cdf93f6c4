"""Write about 1.9 MB of English text: the documentation that Python itself contains.

    python quickstart/prepare_text.py text.jsonl

Each line is a record in the shape of the ELI5 data set, {"title": ..., "answers": {"text": [paragraphs]}}. There is
one per help topic, and one per module of the standard library with its docstrings. Apart from the shortest, a paragraph
occurs in one record only. So records held out for evaluation do not repeat training records.
"""

import argparse
import ast
import contextlib
import json
import re
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests and applications, because their docstrings explain little, and packages that are not Python's own.
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "dist-packages"}
SHORT = 5  # words: a shorter docstring says little, and a shorter paragraph ("For example:") may repeat
SMALL = 40  # words: a shorter record is left out

Section = tuple[str, list[str]]  # a heading, which may be empty, and the paragraphs below it


def paragraphs(text: str | None) -> list[str]:
    """Split a text at blank lines and keep indentation."""
    return [part.rstrip() for part in re.split(r"\n(?:[^\S\n]*\n)+", text or "") if part.strip()]


def words(parts: list[str]) -> int:
    return sum(len(part.split()) for part in parts)


def described(node: ast.AST, outer: str = "") -> Iterator[Section]:
    """Yield the docstrings of the public classes and functions in ``node``, headed by name and arguments."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if not child.name.startswith("_"):  # private, or __special__ and alike in all classes
                arguments = "" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
                yield f"{outer}{child.name}{arguments}", paragraphs(ast.get_docstring(child))
                yield from described(child, f"{outer}{child.name}.")
        elif not isinstance(child, ast.expr):  # "if" and "try" may hold definitions
            yield from described(child, outer)


def modules() -> Iterator[tuple[str, list[Section]]]:
    """Yield the standard library's modules. Read their source, because an import could fail or have effects."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in library.rglob("*.py"):
        name = path.relative_to(library).with_suffix("").parts
        if SKIPPED.isdisjoint(name):
            with contextlib.suppress(OSError, SyntaxError, ValueError):
                tree = ast.parse(path.read_bytes())
                title = ".".join(name).removesuffix(".__init__")
                yield title, [("", paragraphs(ast.get_docstring(tree))), *described(tree)]


def records(sources: list[tuple[str, list[Section]]]) -> list[dict]:
    """Return a record per source, without paragraphs that an earlier record has."""
    seen: set[str] = set()
    made = []
    # The longest first, because some topics are sections of longer ones ("if" of "compound") and read better there.
    for title, sections in sorted(sources, key=lambda source: (-sum(words(parts) for _, parts in source[1]), source)):
        text: list[str] = []
        for heading, parts in sections:
            new = [part for part in parts if words([part]) < SHORT or part not in seen]
            seen.update(new)
            if words(new) >= SHORT:
                text += [heading, *new] if heading else new
        if words(text) >= SMALL:
            made.append({"title": title, "answers": {"text": text}})
    return sorted(made, key=lambda record: record["title"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="the file to write; one of that name is replaced")
    out = parser.parse_args().file
    warnings.simplefilter("ignore")  # the library's own source may hold outdated escapes
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions omit it
        topics = {}
    library = list(modules())
    made = records([(title, [("", paragraphs(text))]) for title, text in topics.items()] + library)
    try:  # write beside the result and rename, so that an interrupted run leaves no half file
        if not made:
            raise OSError("this Python carries neither help topics nor library source: use another")
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            Path(work, out.name).write_bytes(lines.encode("utf-8", errors="replace"))
            Path(work, out.name).replace(out)
    except OSError as error:
        print(f"prepare_text.py: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {out}: {len(made)} records, {out.stat().st_size:,} bytes")
    version = sys.version.split()[0]
    print(f"From {len(topics)} help topics and {len(library)} modules of Python {version}, PSF License Version 2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
