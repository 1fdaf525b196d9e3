"""Prompt files: text, JSON and CSV, each prompt with its weight and metadata. docs/prompts.md has the formats."""

import codecs
import csv
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

Entry = tuple[str, float, dict]
"""A prompt, its weight and its metadata, {} if it has none."""

MAX_CHARACTERS = 10_000
"""The longest prompt. A text encoder reads some hundreds of characters."""
OTHER_SUFFIXES = (".yaml", ".yml", ".toml", ".xml", ".html")
"""Suffixes of text files that are not prompts."""
VALID = "valid is .txt with a prompt a line, .jsonl, .json, .csv or .tsv"
ENCODINGS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16's mark, with which this one begins
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""The encoding by the byte order mark that a file begins with. A file without one is UTF-8."""


def read_entries(file: str) -> Iterator[Entry]:
    """The prompts of a file one by one. Its suffix names its format. Raises ValueError, naming the file and the line at fault."""
    suffix = Path(file).suffix.lower()
    try:
        if suffix in OTHER_SUFFIXES:
            raise ValueError(VALID)
        lines = _lines(file)
        if suffix in (".jsonl", ".ndjson"):
            yield from _of_json_lines(lines)
        elif suffix == ".json":
            yield from _of_json(lines)
        elif suffix in (".csv", ".tsv"):
            yield from _of_csv(lines, ",;\t" if suffix == ".csv" else "\t,;")
        else:
            yield from _of_text(lines)
    except ValueError as error:
        raise ValueError(f"prompts.file={file}: {error}") from None


def _lines(file: str) -> Iterator[str]:
    """A file's lines. In the file they may end as on Unix, Windows or an old Mac; here each ends with a \\n."""
    if not os.path.isfile(file):  # a device or a pipe is refused, too: it may never end
        raise ValueError(f"there is no such file; {VALID}")
    encoding = "utf-8"
    try:
        with open(file, "rb") as stream:
            start = stream.read(4)
        encoding = next((name for mark, name in ENCODINGS.items() if start.startswith(mark)), encoding)
        with open(file, encoding=encoding) as stream:
            for number, line in enumerate(stream, 1):
                if "\0" in line:
                    raise ValueError(f"line {number} has a null byte, as UTF-16 without a byte order mark has; valid is UTF-8")
                yield line
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:  # it knows only a part of the file; to find the line, decode all of it
        try:
            (data := Path(file).read_bytes()).decode(encoding)
        except UnicodeDecodeError as error:
            number = len(data[: error.start].decode(encoding, "ignore").replace("\r\n", "\n").replace("\r", "\n").split("\n"))
            name = encoding.removesuffix("-sig").upper()
            valid = "valid is UTF-8, or UTF-16 with a byte order mark"
            raise ValueError(f"line {number} is not in {name} ({error.reason}); {valid}") from None


_COMMENT = re.compile(r"#+(\s|$)")
_JSON = re.compile(r"""[\[\]{},\s]+|\{\s*["'].*["']\s*:.*""")
_FLAG = re.compile(r"(?:^|\s)(--[A-Za-z]\w*)")


def _of_text(lines: Iterator[str]) -> Iterator[Entry]:
    """One prompt a line, or weight<TAB>prompt. Comments and blank lines are left out."""
    for number, line in enumerate(lines, 1):
        stripped, where = line.strip(), f"line {number}"
        if not stripped or _COMMENT.match(stripped):
            continue
        if stripped[0] == "#":
            raise ValueError(f'{where} begins with "#": valid is "# " for a comment, or a weight and a tab before such a prompt')
        if _is_json(stripped):
            raise ValueError(f"{where} is JSON; {VALID}")
        if number == 1 and "prompt" in (cell.strip(' "').lower() for cell in re.split("[,;\t]", stripped)):
            raise ValueError(f"{where} is a header of CSV; {VALID}")
        weight, prompt = 1.0, stripped
        if "\t" in stripped or line.rstrip("\n ").endswith("\t"):
            before, _, after = line.lstrip().partition("\t")
            if after.strip() or isinstance(_number(before), float):  # otherwise the tab ends the line
                weight, prompt = _number(before), after
        if "--" in prompt and (flag := _FLAG.search(prompt)):
            raise ValueError(
                f"{where} has {flag[1]}, an option of other programs; valid is the prompt alone, or .jsonl, which is taken literally"
            )
        yield _prompt(prompt, where), _weight(weight, where, "a number > 0, a tab, a prompt"), {}


def _is_json(line: str) -> bool:
    """Whether a line is JSON, or a part of it, rather than a prompt that begins with a bracket."""
    if line[0] not in "[{]}":
        return False
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), list | dict)
    return _JSON.fullmatch(line) is not None


def _of_json_lines(lines: Iterator[str]) -> Iterator[Entry]:
    """One JSON object, or text in quotes, a line."""
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"line {number}"
            try:
                value = _parse(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is no JSON: {error.msg}") from None
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            yield _entry(value, where)


def _of_json(lines: Iterator[str]) -> Iterator[Entry]:
    """A list of objects or texts, a mapping of prompts to weights, or, as in JSONL, one object a line."""
    text = "".join(lines)
    try:
        document = _parse(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise ValueError(f"line {error.lineno} is no JSON: {error.msg}") from None
        yield from _of_json_lines(iter(text.split("\n")))
        return
    if isinstance(document, dict) and not isinstance(document.get("prompt"), str):
        document = [{"prompt": prompt, "weight": weight} for prompt, weight in document.items()]
    for number, value in enumerate(document if isinstance(document, list) else [document], 1):
        yield _entry(value, f"entry {number}")


def _parse(text: str) -> object:
    try:
        return _DECODER.decode(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return number


def _unique(members: list[tuple[str, object]]) -> dict:
    if len(found := dict(members)) < len(members):
        names = [name for name, _ in members]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_finite, object_pairs_hook=_unique)


def _entry(value: object, where: str) -> Entry:
    """The entry of a text, or of an object with a prompt and perhaps weight and metadata. Its other members are metadata, too."""
    if isinstance(value, str):
        return _prompt(value, where), 1.0, {}
    if not isinstance(value, dict) or "prompt" not in value:
        raise ValueError(
            f'{where} has no prompt; valid is {{"prompt": "...", "weight": 1, "metadata": {{...}}}}; weight and metadata are optional'
        )
    others = {name: member for name, member in value.items() if name not in ("prompt", "weight", "metadata")}
    weight, metadata = value.get("weight"), value.get("metadata")
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{where} has metadata that is no object: {_shown(metadata)}")
    if twice := next((name for name in metadata if name in others), None):
        raise ValueError(f"{where} has {twice!r} twice, in its metadata and beside it")
    return _prompt(value["prompt"], where), 1.0 if weight is None else _weight(weight, where), others | metadata


def _of_csv(lines: Iterator[str], delimiters: str) -> Iterator[Entry]:
    """One prompt a row, below a header with a column `prompt` and perhaps a column `weight`. The other columns are metadata, as texts."""
    header, last = next(lines, ""), 0
    try:
        delimiter, names = next(((mark, names) for mark in delimiters if "prompt" in (names := _names(header, mark))), ("", []))
        if not names:
            raise ValueError(f"line 1 is {_shown(header.strip())}; valid is a header with a column prompt")
        if len(set(names)) < len(names):
            raise ValueError(f"line 1 has the column {next(name for name in names if names.count(name) > 1)!r} twice")
        reader, last = csv.reader(lines, delimiter=delimiter, strict=True), 1
        for row in reader:
            where, last = f"line {last + 1}", 1 + reader.line_num  # a row may have several lines
            if not any(cell.strip() for cell in row):
                continue
            if len(row) != len(names):
                raise ValueError(f"{where} has {len(row)} columns, and the header {len(names)}")
            metadata = dict(zip(names, row))
            prompt, weight = metadata.pop("prompt"), metadata.pop("weight", "").strip() or "1"
            yield _prompt(prompt, where), _weight(_number(weight), where), metadata
    except csv.Error as error:
        raise ValueError(f"line {last + 1}: {error}") from None


def _names(header: str, delimiter: str) -> list[str]:
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    return [name.lower() if name.lower() in ("prompt", "weight") else name for name in names]


def _number(text: str) -> float | str:
    """The number in `text`, or `text` itself if it is not a number."""
    with suppress(ValueError):
        return float(text)
    return text


def _weight(weight: object, where: str, valid: str = "a finite number > 0") -> float:
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= sys.float_info.max:
        raise ValueError(f"{where} has weight {_shown(weight)}; valid is {valid}")
    return float(weight)


def _prompt(prompt: object, where: str) -> str:
    """The prompt without spaces around it."""
    if not isinstance(prompt, str):
        raise ValueError(f"{where} has the prompt {_shown(prompt)}; valid is a text")
    prompt = prompt.strip()
    if not prompt:
        raise ValueError(f"{where} has an empty prompt")
    if len(prompt) > MAX_CHARACTERS:
        raise ValueError(f"{where} has a prompt of {len(prompt):,} characters; valid is at most {MAX_CHARACTERS:,}")
    if not prompt.isascii() and _HALF.search(prompt) or "\0" in prompt:  # JSON's escapes allow both
        raise ValueError(f"{where} has a prompt with a null byte or half of a surrogate pair")
    return prompt


_HALF = re.compile("[\ud800-\udfff]")


def _shown(value: object) -> str:
    text = repr(value)
    return text[:80] + "..." * (len(text) > 80)
