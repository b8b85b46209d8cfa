"""The page: gradio's components around `answers`, and its server, which needs no network and asks for none."""

import base64
import contextlib
import functools
import html
import io
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from PIL import Image

from flair_jax.demo import answers
from flair_jax.inference import TEMPLATES, Pretrained
from flair_jax.search import Index

# gradio reads it when it is imported: neither starts nor errors of the page are reported to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
import gradio

AT_A_TIME = 2  # answers that are computed at a time; others wait in the queue
WAITING = 50  # that wait, at most
BROWSER_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # that browsers show; others are handed back as PNG
KEPT_SECONDS = 3600  # uploaded pictures are removed afterwards
EXAMPLE = "a red fox in the snow"
TITLES = {
    "conditioned": "text-conditioned cosine",
    "global": "global cosine",
    "regions": "nearest region's cosine",
    "probability": "probability",
}
CSS = """
.answer table { border-collapse: collapse; width: 100%; border: 0 !important; }
.answer th, .answer td { padding: 6px 10px; text-align: right; border: 0; }
.answer tr { border: 0; border-bottom: 1px solid var(--border-color-primary); }
.answer th:first-child, .answer td:first-child { text-align: left; overflow-wrap: anywhere; }
@media (max-width: 640px) {  /* the text above its scores */
  .answer tr { display: flex; flex-wrap: wrap; }
  .answer th, .answer td { flex: 1; min-width: 0; padding: 2px 4px !important; text-align: left; }
  .answer th { font-size: 0.85em; }
  .answer th:first-child, .answer td:first-child { flex-basis: 100%; }
}
.answer .figures { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 210px), 1fr)); }
.answer .small { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); }
.answer figure { margin: 0; }
.answer img { display: block; width: 100%; height: auto; }
.answer img.legend, .answer img.sheet { width: auto; max-width: 100%; margin-bottom: 12px; background: white; }
.answer img.legend { padding: 6px; }
.answer img.regions { width: 420px; max-width: 100%; }
.answer figcaption, .answer li { overflow-wrap: anywhere; }
.answer figcaption small { font-size: 0.85em; opacity: 0.75; }
.answer ul { list-style: none; margin: 12px 0 0; padding: 0; }
.answer li span { display: inline-block; width: 14px; height: 14px; margin-right: 8px; vertical-align: -2px; }
.answer h3 { margin: 16px 0 8px; overflow-wrap: anywhere; }
.answer .refused { padding: 8px 12px; border-left: 4px solid var(--error-border-color);
  background: var(--error-background-fill); color: var(--error-text-color); overflow-wrap: anywhere; }
"""


# ---------------------------------------------------------------------------------------------------------------------
# Results as HTML. Whatever users typed, or files are called, is escaped.


def table(texts: Sequence[str], columns: dict[str, Sequence[float]]) -> str:
    """Scores: a line per text, a column per kind."""
    head = "".join(f"<th>{html.escape(TITLES[name])}</th>" for name in columns)
    rows = (
        f"<tr><td>{html.escape(text)}</td>" + "".join(f"<td>{value:.3f}</td>" for value in values) + "</tr>"
        for text, *values in zip(texts, *columns.values(), strict=True)
    )
    return f"<table><tr><th>text</th>{head}</tr>{''.join(rows)}</table>"


def gallery(figures: Sequence[answers.Figure], kind: str = "") -> str:
    """Pictures beside each other, as many as there is room for, with their titles and notes; "small" ones for more."""
    cells = (
        f"<figure>{picture(figure.image, figure.title)}<figcaption>{html.escape(figure.title)}<br>"
        f"<small>{html.escape(figure.note)}</small></figcaption></figure>"
        for figure in figures
    )
    return f'<div class="figures {kind}">{"".join(cells)}</div>'


def picture(image: Image.Image, description: str, kind: str = "") -> str:
    """A picture, within the page itself."""
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{kind}" alt="{html.escape(description)}" src="data:image/webp;base64,{data}">'


def legend(classes: Sequence[tuple[str, tuple[int, int, int], float]]) -> str:
    """Classes with their colours and shares."""
    lines = (
        f'<li><span style="background: rgb{colour}"></span>{html.escape(name)}, {share:.0%}</li>'
        for name, colour, share in classes
    )
    return f"<ul>{''.join(lines)}</ul>"


def refused(message: str) -> str:
    """A message for the user, which screen readers read at once."""
    return f'<p class="refused" role="alert">{html.escape(message)}</p>'


# ---------------------------------------------------------------------------------------------------------------------
# The page


def build(model: Pretrained, title: str, *, index: Index | None = None, scenes: bool = False) -> gradio.Blocks:
    """The page of a model; parts that the model cannot do are absent.

    Nothing is kept between answers: each follows from the model, the index and what the browser sends.

    Args:
      model: what computes.
      title: what the page calls it.
      index: of a folder, to search in; None: no search.
      scenes: whether the model knows drawn scenes: the page offers to draw some.
    """
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)) as page:
        gradio.Markdown(f"# {_plain(title)}")
        if index is None:
            _about_a_picture(model, scenes)
        else:
            with gradio.Tabs():
                with gradio.Tab("A picture"):
                    _about_a_picture(model, scenes)
                with gradio.Tab("Search"):
                    _about_a_folder(index)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_A_TIME)


def _about_a_picture(model: Pretrained, scenes: bool) -> None:
    template = "{c}" if scenes else TEMPLATES[0]
    fields = {}
    with gradio.Row():
        with gradio.Column(scale=2, min_width=300):
            upload = _upload()
            message = gradio.HTML(elem_classes="answer")
            draw = gradio.Button("Draw a scene") if scenes else None
        with gradio.Column(scale=3, min_width=320), gradio.Tabs():
            with gradio.Tab("Scores and heat maps" if (views := answers.views(model)) else "Scores"):
                fields["texts"] = gradio.Textbox(
                    label="Texts, one a line", lines=3, placeholder="a red fox in the snow"
                )
                ask = gradio.Button("Compare", variant="primary")
                scores = _result("scores")
                if views:
                    choices = [(name, view) for view, name in views.items()]
                    view = gradio.Dropdown(choices, value=choices[0][1], label="Heat maps", filterable=False)
                    maps = _result("heat-maps")
            if modes := answers.segmentation_modes(model):
                with gradio.Tab("Segmentation"):
                    fields["classes"] = gradio.Textbox(
                        label="Classes, one a line",
                        info="Every pixel gets one of them: name what else is in the picture, too.",
                        lines=3,
                        placeholder="fox\nsnow\nsky",
                    )
                    of_class = gradio.Textbox(template, label="Text of a class, {c} is its name", max_lines=1)
                    choices = [(name, mode) for mode, name in modes.items()]
                    # Models of drawn scenes segment better by the pooling's values, see docs/quality.md.
                    preferred = "value" if scenes and "value" in modes else choices[0][1]
                    by = gradio.Dropdown(
                        choices,
                        value=preferred,
                        label="What is compared with the classes",
                        filterable=False,
                        visible=len(choices) > 1,
                    )
                    divide = gradio.Button("Segment", variant="primary")
                    segments = _result("segments")
            if model.model.has_regions:
                with gradio.Tab("Regions"):
                    fields["descriptions"] = gradio.Textbox(
                        label="Descriptions, one a line", info="Without any, all regions are shown.", lines=3
                    )
                    find = gradio.Button("Find regions", variant="primary")
                    found = _result("regions")

    def scores_of(shown, texts):
        return table(texts, answers.scores(model, shown, texts))

    def maps_of(shown, texts, view):
        scale, figures = answers.heat_maps(model, shown, texts, view)
        return picture(scale, "what the colours stand for", "legend") + gallery(figures)

    def compare(path, typed, view=None):
        lines = answers.lines(typed, answers.MAX_TEXTS)
        shown, texts = model.encoded(answers.read_picture(path), lines)
        return (scores_of(shown, texts), maps_of(shown, texts, view)) if views else scores_of(shown, texts)

    def look_again(path, typed, view):
        if not path or not typed:
            return ""
        return maps_of(answers.read_picture(path), answers.lines(typed, answers.MAX_TEXTS), view)

    def segment(path, typed, template, mode):
        names = answers.lines(typed, answers.MAX_CLASSES, "class")
        result = answers.segment(model, answers.read_picture(path), names, template, mode)
        return picture(result.image, "the classes of the pixels", "sheet") + legend(result.classes)

    def regions(path, typed):
        texts = answers.lines(typed, answers.MAX_TEXTS) if (typed or "").strip() else []
        return picture(answers.regions(model, answers.read_picture(path), texts), "regions", "regions")

    def check(path):
        try:
            image = answers.read_picture(path)
        except answers.Refused as error:
            return None, refused(str(error))
        return path if answers.stored_format(path) in BROWSER_FORMATS else image, ""

    def draw_one():
        image, texts, names = answers.scene(random.randrange(2**31))
        values = {"texts": texts, "classes": names, "descriptions": names[:-1]}
        return image, "", *("\n".join(values[field]) for field in fields)

    upload.upload(check, upload, [upload, message], api_visibility="private", show_progress="hidden")
    if views:
        _answer(ask, compare, [upload, fields["texts"], view], scores, maps)
        _answer(view, look_again, [upload, fields["texts"], view], maps)
    else:
        _answer(ask, compare, [upload, fields["texts"]], scores)
    if "classes" in fields:
        _answer(divide, segment, [upload, fields["classes"], of_class, by], segments)
    if "descriptions" in fields:
        _answer(find, regions, [upload, fields["descriptions"]], found)
    if scenes:
        draw.click(draw_one, None, [upload, message, *fields.values()], api_visibility="private")


def _about_a_folder(index: Index) -> None:
    texts = gradio.Textbox(label="Texts, one a line", lines=2, placeholder=EXAMPLE)
    ask = gradio.Button("Search", variant="primary")
    hits = _result("hits")

    def search(typed):
        found = answers.search(index, answers.lines(typed, answers.MAX_TEXTS))
        return "".join(f"<h3>{html.escape(text)}</h3>{gallery(figures, 'small')}" for text, figures in found)

    _answer(ask, search, [texts], hits)


def _upload() -> gradio.Image:
    """The field for a picture. What is uploaded reaches `answers.read_picture` as it is: as the path of a file.

    Answers may change its value alone: at other changes (`gradio.update`, `gradio.skip`) gradio makes it anew, without
    what is replaced here. A class of its own is no way: gradio writes a stub of it beside its source.
    """
    field = gradio.Image(
        label="Picture",
        type="filepath",
        format="png",
        sources=["upload", "clipboard"],
        height=340,
        elem_id="upload",
        buttons=[],
    )

    def path(payload):
        return None if payload is None else payload.path  # gradio would open it, with every format of Pillow's

    keep = field.async_move_resource_to_block_cache

    async def uploaded_file(address):
        if address is not None and "://" in str(address):  # gradio would fetch it
            raise gradio.Error("Addresses are not taken: give a file.", print_exception=False)
        return await keep(address)

    field.preprocess, field.async_move_resource_to_block_cache = path, uploaded_file
    return field


def _result(name: str) -> gradio.HTML:
    return gradio.HTML(elem_id=name, elem_classes="answer", min_height=20)


def _answer(asked: Any, answer: Callable[..., Any], inputs: Sequence[Any], *results: gradio.HTML) -> None:
    """Shows the answer, a text per result, when a button is clicked or a choice changes; where the input is refused,
    the message as the first result, and no others.
    """

    @functools.wraps(answer)
    def answered(*values):
        try:
            return answer(*values)
        except answers.Refused as error:
            message = refused(str(error))
            return [message, *[""] * (len(results) - 1)] if len(results) > 1 else message

    event = asked.click if isinstance(asked, gradio.Button) else asked.input
    event(
        answered, inputs, list(results), concurrency_id="model", concurrency_limit=AT_A_TIME, api_visibility="private"
    )


def _plain(text: str) -> str:
    """A text whose characters mean nothing to Markdown."""
    return "".join(f"&#{ord(character)};" if not character.isalnum() else character for character in text)


@contextlib.contextmanager
def serve(page: gradio.Blocks, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serves a page in the context, which gets its address.

    Uploaded files lie in the folder that GRADIO_TEMP_DIR names; those of this page are removed at the end.

    Args:
      port: None: the first free one from 7860.

    Raises:
      OSError: the port is in use, or this machine has no such host.
    """
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    options = dict(
        max_file_size=answers.MAX_BYTES,
        theme=theme,
        css=CSS,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        share=False,
        mcp_server=False,
        pwa=False,
        inline=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    try:
        try:
            _, address, _ = page.launch(server_name=host, server_port=port, **options)
        except OSError as error:
            raise OSError(
                f"cannot serve at {host}, port {port or '7860 and the next ones'}: it is in use, or {host} is "
                "no address of this machine; see --host and --port"
            ) from error
        yield address
    finally:
        page.close(verbose=False)
