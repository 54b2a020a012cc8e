"""mkdocs: a page per paper, made of the sections of PAPERS.md and of what LOG.md found, when the site is built."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# What a paper is called in LOG.md, by what its section's title holds.
NAMES = {
    "AutoFormer": "AutoFormer",
    "DynamicViT": "DynamicViT",
    "Patch Slimming": "Patch Slimming",
    "Slimming a trained network": "[Ss]limm|[Ff]old",
    "EViT": "EViT|[Mm]erg",
    "EsViT": "EsViT|self-distillation|[Pp]re-training",
    "FocusFormer": "FocusFormer|learned sampler",
    "Transformer-LS": "Transformer-LS|[Ll]ong-short",
    "Manifold distillation": "[Mm]anifold",
    "ViT-ResNAS": "ViT-ResNAS",
    "X-formers": "X-formers|Performer|Linformer|Nystrom|mixer",
    "ViTAS": "ViTAS",
}


def pages() -> dict[str, tuple[str, str]]:
    """By the path of a page: its title, and its text."""
    text = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
    log = re.split(r"^## ", (ROOT / "LOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    found = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = section.partition("\n")
        name = next((name for name in NAMES if name in title), None)
        findings = [entry.partition("\n") for entry in log if name and re.search(NAMES[name], entry)]
        measured = "".join(
            f'\n??? note "{heading.replace(chr(34), "")}"\n{_indented(entry)}\n'
            for heading, _, entry in findings
        )
        short = name or title.partition(",")[0]
        slug = re.sub(r"\W+", "-", short.lower()).strip("-")
        more = (
            f"\n## Measured here\n\nEntries of LOG.md that name it, the newest first, failures included.\n{measured}"
            if measured
            else ""
        )
        page = re.sub(
            r"\[([^]]+)\]\((benchmarks/[^)]+)\)", r"\1 (`\2`)", body + more
        )  # is not part of the site
        found[f"papers/{slug}.md"] = (short, f"# {title}\n{page}")
    return found


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


def on_config(config: Any) -> Any:
    """Pages of papers stand below the page that lists them."""
    for entry in config["nav"]:
        if "Papers" in entry:
            entry["Papers"] = [entry["Papers"], *({title: path} for path, (title, _) in pages().items())]
    return config


def on_files(files: Any, config: Any) -> Any:
    """The pages themselves."""
    from mkdocs.structure.files import File

    for path, (_, text) in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The list of them."""
    if page.file.src_uri != "papers.md":
        return markdown
    return markdown + "".join(f"\n- [{title}]({path})" for path, (title, _) in pages().items()) + "\n"
