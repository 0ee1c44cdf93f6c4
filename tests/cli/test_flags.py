import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import torch

import export
import generate
import perplexity
import train
from cli import errors
from cli.errors import UserError
from cli.flags import AnyPath, Count, Range, flag, parse


@dataclass
class Settings:
    title = "settings"

    batch_size: Count = flag(8, "blocks")
    learning_rate: Annotated[float, Range(above=0, below=1)] = flag(2e-5, "peak")
    max_steps: Count | None = flag(None, "100% of the updates")
    compile: Literal["auto", "on", "off"] = flag("auto", "mode")
    files: list[str] = flag([], "files")
    overrides: str | None = flag(None, "JSON")
    resume: bool = flag(False, "go on")
    separator: str = flag(" ", "between")
    model: AnyPath | None = flag(None, "a directory")
    texts: list[AnyPath] = flag([], "paths")
    recompute: Literal["off", "full", "selective"] = flag("off", "activations", bare="full")

    def rules(self):
        return [(self.batch_size != 13, "--batch_size 13: unlucky")]


def read(*argv, yaml=None, tmp_path=None):
    if yaml is not None:
        (tmp_path / "c.yaml").write_text(yaml)
        argv = (*argv, "--config", str(tmp_path / "c.yaml"))
    return parse(Settings, "", list(argv))[0]


def test_precedence_and_yaml_types(tmp_path):
    text = 'batch_size: 4\nlearning_rate: 1e-4\ncompile: on\nfiles: [a, "b c"]\nresume: true\nseparator: "\\n\\n"\n'
    text += "max_steps:\noverrides: {n_layer: 4, eps: 1e-5}\n"
    settings = read("--batch_size", "2", "--files", "z", yaml=text, tmp_path=tmp_path)
    assert settings == Settings(
        2, 1e-4, None, "on", ["z"], '{"n_layer": 4, "eps": 1e-05}', True, "\n\n"
    )  # flags beat the file, the file beats defaults
    assert read(yaml=text, tmp_path=tmp_path).files == ["a", "b c"]
    assert read() == Settings()


@pytest.mark.parametrize(
    ("argv", "yaml", "words"),
    [
        (["--bach_size", "2"], None, ["--bach_size", "Use --batch_size"]),
        (["--batch", "2"], None, ["--batch"]),  # no abbreviations: a later flag could change their meaning
        (["--batch_size", "two"], None, ["--batch_size two: must be a whole number"]),
        (["--batch_size", "0"], None, ["--batch_size 0", "at least 1"]),
        (["--max_steps", "-1"], None, ["--max_steps -1", "at least 1"]),
        (["--learning_rate", "nan"], None, ["--learning_rate nan", "above 0"]),
        (["--learning_rate", "1"], None, ["--learning_rate 1.0", "below 1"]),
        (["--compile", "maybe"], None, ["--compile maybe: unknown. Use one of"]),
        (["--batch_size", "13"], None, ["unlucky"]),
        (["stray"], None, ["stray: unknown"]),
        ([], "bach_size: 2", ["c.yaml", "bach_size: unknown", "Use batch_size"]),
        ([], "batch_size: two", ["--batch_size two: must be a whole number"]),
        ([], "batch_size: [", ["c.yaml", "not valid YAML"]),
        ([], "- batch_size", ["c.yaml", "mapping"]),
        (["--config", "missing.yaml"], None, ["missing.yaml", "No such file"]),
    ],
)
def test_wrong_settings_say_what_is_wrong(argv, yaml, words, tmp_path):
    with pytest.raises(UserError) as error:
        read(*argv, yaml=yaml, tmp_path=tmp_path)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_flag_with_a_bare_value(tmp_path):
    """In YAML it may be true or false, as in files of older runs."""
    assert read("--recompute").recompute == read("--recompute", "--resume").recompute == "full"
    assert read("--recompute", "selective").recompute == "selective"
    for text, value in {"true": "full", "false": "off", "off": "off", "selective": "selective", "on": "full"}.items():
        assert read(yaml=f"recompute: {text}", tmp_path=tmp_path).recompute == value
    with pytest.raises(UserError, match="--recompute some: unknown"):
        read("--recompute", "some")


def test_all_bad_values_are_named_at_once():
    with pytest.raises(UserError) as error:
        read("--batch_size", "0", "--learning_rate", "-1")
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["--batch_size", "--learning_rate"]


def test_unknown_flags_are_named_with_the_bad_values():
    with pytest.raises(UserError) as error:
        read("--foo", "1", "--oom", "x", "--batch_size", "0")
    said = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in said] == ["--foo", "--oom", "--batch_size 0"]


def test_a_tilde_is_the_home_directory_in_paths_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "model: ~/m\ntexts: [~/a, b~]\nseparator: ~/\n"
    settings = read(yaml=text, tmp_path=tmp_path)
    assert (settings.model, settings.texts, settings.separator) == ("/home/me/m", ["/home/me/a", "b~"], "~/")
    assert read("--model=~/n", yaml=text, tmp_path=tmp_path).model == "/home/me/n"
    (tmp_path / "home.yaml").write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(Settings, "", ["--config", "~/home.yaml"])[0].model == f"{tmp_path}/m"


def test_help_names_each_flag_and_default_once(capsys):
    with pytest.raises(SystemExit):
        read("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "--batch_size N blocks (default: 8)" in text and "--texts PATH ... paths" in text
    assert "--batch-size" not in text and "100% of the updates" in text


@pytest.mark.parametrize(
    "kind", [train.Config, generate.GenerateConfig, perplexity.PerplexityConfig, export.ExportConfig]
)
def test_help_fits_a_terminal(kind, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    script = sys.modules[kind.__module__]
    with pytest.raises(SystemExit):
        parse(kind, script.__doc__, ["--help"])
    text = capsys.readouterr().out
    assert f"\n    python {script.__name__}.py --" in text
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_what_the_compiler_raises_is_one_line():
    error = errors.as_user_error(torch._dynamo.exc.Unsupported("no\nway"))
    assert error.exit_code == 2 and str(error).startswith("--compile: failed (no way")
