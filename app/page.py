"""The page: what is where, and what happens on a click. All work is done in `backend`."""

import html
import logging
from collections.abc import Iterator
from typing import Any

import gradio as gr

from .backend import FILES, Backend, Conversation, Update, UserError
from .samples import DATA, SAMPLES

WELCOME = """# Molmo2
Add **pictures** or **a clip**, and ask. Points are drawn while the answer is written; ask again, and the pictures are
not read a second time."""
HINT = "Ask about what you added: “Point to the red circles.”, “How many are there?”, “Track the red ring.”"
FAILED = "Something went wrong here, and it was not your fault. The terminal of the app says more."
EXPORTS = {"json": "↓ JSON", "csv": "↓ CSV", "coco": "↓ COCO", "mot": "↓ MOT"}

log = logging.getLogger(__name__)


class Page:
    """The components and their handlers; `blocks` is what gradio launches."""

    def __init__(self, backend: Backend):
        self.backend = backend
        with gr.Blocks(title="Molmo2", analytics_enabled=False) as self.blocks:
            gr.Markdown(WELCOME)
            if backend.notice:
                gr.Markdown(backend.notice, elem_id="notice")
            self.conversation = gr.State(None)
            self.question = gr.Textbox(
                label="Question",
                placeholder="Point to the red circles.",
                submit_btn="Ask",
                elem_id="question",
                render=False,
            )
            with gr.Row():
                with gr.Column(scale=1):
                    self._lay_out_pictures()
                with gr.Column(scale=1):
                    self._lay_out_chat()
            self._connect()

    # --- what is where -----------------------------------------------------------------------------------------------

    def _lay_out_pictures(self) -> None:
        self.files = gr.File(
            label="Pictures, or one clip",
            file_count="multiple",
            file_types=["image", "video"],
            height=140,
            elem_id="files",
        )
        gr.Examples(
            [[[str(path) for path in sample.paths], sample.question] for sample in SAMPLES],
            inputs=[self.files, self.question],
            example_labels=[sample.label for sample in SAMPLES],
            label="Or try one of these",
        )
        self.status = gr.Markdown(visible=False, elem_id="status")
        self.clip = gr.Video(
            label="Clip", autoplay=True, loop=True, interactive=False, visible=False, height=320, elem_id="clip"
        )
        self.pictures = gr.Gallery(
            show_label=False,
            format="png",
            object_fit="contain",
            columns=1,
            height="auto",
            interactive=False,
            visible=False,
            elem_id="pictures",
        )
        with gr.Row():
            self.exports = {
                name: gr.DownloadButton(label, interactive=False, size="sm", min_width=60, elem_id=f"export_{name}")
                for name, label in EXPORTS.items()
            }

    def _lay_out_chat(self) -> None:
        self.chat = gr.Chatbot(
            label="Conversation", height=420, render_markdown=False, placeholder=HINT, buttons=[], elem_id="chat"
        )
        self.question.render()
        with gr.Row():
            self.stop = gr.Button("Stop", size="sm", elem_id="stop")
            self.again = gr.Button("New conversation", size="sm", elem_id="again")
        self.note = gr.Markdown(elem_id="note")
        with gr.Accordion("The answer as the model wrote it", open=False):
            self.raw = gr.Textbox(show_label=False, lines=3, interactive=False, elem_id="raw")

    def _connect(self) -> None:
        shown = [self.conversation, self.status, self.pictures, self.clip, self.chat, self.note, self.raw]
        outputs = [*shown, *self.exports.values()]
        self.files.change(self.open, self.files, outputs, show_progress="hidden")
        gr.on([self.again.click, self.chat.clear], self.open, self.files, outputs, show_progress="hidden")
        self.question.submit(
            self.ask, [self.question, self.conversation, self.chat], [*outputs, self.question], show_progress="hidden"
        )
        self.stop.click(lambda conversation: conversation and conversation.stop(), self.conversation)

    # --- what happens ------------------------------------------------------------------------------------------------

    def open(self, paths: list[str] | None) -> dict[Any, Any]:
        """Start a conversation about what was added."""
        fresh = {self.chat: [], self.note: "", self.raw: "", self.clip: gr.Video(visible=False), **self._exports({})}
        nothing = {**fresh, self.conversation: None, self.pictures: gr.Gallery(visible=False)}
        if not paths:
            return {**nothing, self.status: gr.Markdown(visible=False)}
        try:
            conversation = self.backend.open(paths)
        except UserError as error:
            return {**nothing, **self._message(error)}
        except Exception:
            log.exception("Opening %s failed.", paths)
            return {**nothing, **self._message(FAILED)}
        opened = {**fresh, self.conversation: conversation, self.status: gr.Markdown(visible=False)}
        if conversation.clip is None:
            return {**opened, self.pictures: self._gallery(conversation.images)}
        clip = gr.Video(str(conversation.clip), visible=True)
        return {**opened, self.pictures: gr.Gallery(visible=False), self.clip: clip}

    def ask(
        self, question: str, conversation: Conversation | None, chat: list[dict[str, Any]]
    ) -> Iterator[dict[Any, Any]]:
        """Answer a question, as it is written."""
        updates = None
        try:
            if conversation is None:
                raise UserError("Add a picture or a clip first.")
            updates = conversation.answer(question)
            turns = [*chat, _turn("user", question.strip())]
            for update in updates:
                yield {
                    self.chat: [*turns, _turn("assistant", update.text)],
                    self.raw: update.raw,
                    **self._changed(update),
                }
        except UserError as error:
            yield self._message(error)
        except Exception:
            log.exception("Answering %r failed.", question)
            yield self._message(FAILED)
        finally:
            if updates is not None:
                updates.close()  # stops the model when the user does

    def _changed(self, update: Update) -> dict[Any, Any]:
        """What an update changes besides the text."""
        changed: dict[Any, Any] = {}
        if update.pictures is not None:
            changed[self.pictures] = self._gallery(update.pictures)
        if update.clip is not None:
            changed[self.clip] = gr.Video(str(update.clip), visible=True)
        if update.files is not None:
            changed |= self._exports(update.files)
        if update.note:  # the last one
            changed |= {self.note: update.note, self.question: "", self.status: gr.Markdown(visible=False)}
        return changed

    def _message(self, text: Any) -> dict[Any, Any]:
        return {self.status: gr.Markdown(f"⚠️ {text}", visible=True)}

    def _exports(self, files: dict[str, Any]) -> dict[Any, Any]:
        return {
            self.exports[name]: gr.DownloadButton(
                value=str(files[name]) if name in files else None, interactive=name in files
            )
            for name in FILES
        }

    @staticmethod
    def _gallery(pictures: Any) -> gr.Gallery:
        return gr.Gallery(list(pictures), columns=min(2, len(pictures)), visible=True)


def _turn(role: str, text: str) -> dict[str, str]:
    """A message that shows the text as it is; gradio would take tags in it for HTML."""
    return {"role": role, "content": html.escape(text, quote=False)}


def launch(page: Page, host: str, port: int, *, wait: bool = True) -> str:
    """Serve a page.

    Args:
        wait: Until the process is interrupted; otherwise it is served in the background.
    Returns:
        Its address.
    """
    _, address, _ = page.blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        allowed_paths=[str(DATA)],
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        quiet=not wait,
    )
    return address
