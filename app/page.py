"""The user interface: layout and event handlers. The logic is in `backend`."""

import html
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from .backend import FILES, TASKS, Backend, Conversation, Update, UserError
from .hosts import SHARED, CheckedHosts, own_names
from .samples import DATA, SAMPLES
from .uploads import Uploads

WELCOME = """# Molmo2
Add **images** or **a video**, and ask. Points are drawn while the answer is generated; follow-up questions reuse the
encoded images."""
HINT = "Ask about your files: “Point to the red circles.”, “How many are there?”, “Track the red ring.”"
MAX_FILE_SIZE = "1gb"  # of an upload; media have narrower limits
MAX_QUESTIONS, MAX_WAITING = 4, 32  # at a time, of all visitors
ENDING = "The answer is being ended …"
OPENING = "Other files are being opened. Ask once they are shown."
FAILED = "An internal error occurred. The terminal of the app has the details."
EXPORTS = {"json": "↓ JSON", "csv": "↓ CSV", "coco": "↓ COCO", "mot": "↓ MOT"}

log = logging.getLogger(__name__)


class Page:
    """The components and their handlers; `blocks` is what gradio launches."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.uploads = Uploads((path for sample in SAMPLES for path in sample.paths), get_upload_folder)
        with gr.Blocks(title="Molmo2", analytics_enabled=False) as self.blocks:
            gr.Markdown(WELCOME)
            if backend.notice:
                gr.Markdown(backend.notice, elem_id="notice")
            self.conversation = gr.State(None)
            # What the visitor sees, while the state is what the server has by the time it comes to a question.
            self.name = gr.Textbox(visible=False)
            self.question = gr.Textbox(
                label="Question",
                placeholder="Point to the red circles.",
                submit_btn="Ask",
                elem_id="question",
                render=False,
            )
            with gr.Row():
                with gr.Column(scale=1):
                    self._lay_out_media()
                with gr.Column(scale=1):
                    self._lay_out_chat()
            self._connect()

    # --- layout ------------------------------------------------------------------------------------------------------

    def _lay_out_media(self) -> None:
        self.files = gr.File(
            label="Images, or one video",
            file_count="multiple",
            file_types=["image", "video"],
            height=140,
            elem_id="files",
        )
        gr.Examples(
            [[[str(path) for path in sample.paths], sample.question] for sample in SAMPLES],
            inputs=[self.files, self.question],
            example_labels=[sample.label for sample in SAMPLES],
            label="Examples",
        )
        # No bounds here: the backend's refusals are shown where all others are.
        can_choose = bool(self.backend.engine.sampling_options)
        title = "Frames of a video (Enter starts a new conversation)"
        with gr.Accordion(title, open=False, visible=can_choose), gr.Row():
            self.num_frames = gr.Number(
                self.backend.num_frames if can_choose else None,
                label="Maximum number of frames",
                precision=0,
                elem_id="num_frames",
            )
            self.max_fps = gr.Number(0, label="Maximum frames per second (0: the model's own)", elem_id="max_fps")
        self.status = gr.Markdown(visible=False, elem_id="status")
        self.video = gr.Video(
            label="Video", autoplay=True, loop=True, interactive=False, visible=False, height=320, elem_id="video"
        )
        self.images = gr.Gallery(
            show_label=False,
            format="png",
            object_fit="contain",
            columns=1,
            height="auto",
            interactive=False,
            visible=False,
            elem_id="images",
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
        self.task = gr.Radio(list(TASKS), value="Ask", label="Task", elem_id="task")
        self.question.render()
        with gr.Row():
            self.stop = gr.Button("Stop", size="sm", elem_id="stop")
            self.again = gr.Button("New conversation", size="sm", elem_id="again")
        self.note = gr.Markdown(elem_id="note")
        with gr.Accordion("The answer as generated", open=False):
            self.raw = gr.Textbox(show_label=False, lines=3, interactive=False, elem_id="raw")

    def _connect(self) -> None:
        shown = [self.conversation, self.status, self.images, self.video, self.chat, self.note, self.raw]
        outputs = [*shown, self.name, *self.exports.values()]
        opening = [self.files.change, self.again.click, self.chat.clear, self.num_frames.submit, self.max_fps.submit]
        media = [self.files, self.num_frames, self.max_fps, self.conversation]
        self.question.submit(
            self.ask,
            [self.question, self.conversation, self.task, self.name],
            [*outputs, self.question],
            show_progress="hidden",
            trigger_mode="multiple",  # `answer` refuses a question during an answer; gradio would drop it silently
        )
        # No `cancels`: gradio may send an update of an answer after its cancellation, which its page then shows, or
        # calls an error. `open` waits for the end of the answer instead.
        gr.on(opening, self.open, media, outputs, show_progress="hidden", trigger_mode="always_last")
        self.stop.click(lambda conversation: conversation and conversation.stop(), self.conversation)
        self.blocks.unload(self.leave)

    # --- event handlers ----------------------------------------------------------------------------------------------

    def open(
        self,
        paths: list[str] | None,
        num_frames: float | None = None,
        max_fps: float | None = None,
        previous: Conversation | None = None,
        request: gr.Request | None = None,
    ) -> Iterator[dict[Any, Any]]:
        """Start a conversation about the uploaded files, once the answer in the previous one has ended."""
        session = "" if request is None else request.session_hash or ""
        fresh = {self.chat: [], self.note: "", self.raw: "", self.video: gr.Video(visible=False), **self._exports({})}
        with self.uploads.opening(session):
            if previous is not None:
                if previous.is_answering:  # at once; the model may take a while
                    yield {**fresh, self.name: "", self.status: gr.Markdown(ENDING, visible=True)}
                previous.close()  # its last update has been sent: none can follow those below
            self.uploads.keep(session, paths or [])
            yield {**fresh, **self._opened(paths, num_frames, max_fps)}
            yield gr.skip()  # gradio sends what came last once more at the end, which would hide a later message

    def _opened(self, paths: list[str] | None, num_frames: float | None, max_fps: float | None) -> dict[Any, Any]:
        """The components of a new conversation, or of what is wrong with its files."""
        nothing = {self.conversation: None, self.name: "", self.images: gr.Gallery(visible=False)}
        if not paths:
            return {**nothing, self.status: gr.Markdown(visible=False)}
        try:
            conversation = self.backend.open(paths, num_frames, max_fps or None)
        except UserError as error:
            return {**nothing, **self._message(error)}
        except Exception:
            log.exception("Opening %s failed.", paths)
            return {**nothing, **self._message(FAILED)}
        opened = {
            self.conversation: conversation,
            self.name: conversation.name,
            self.status: gr.Markdown(visible=False),
        }
        if conversation.video is None:
            return {**opened, self.images: self._gallery(conversation.images)}
        video = gr.Video(str(conversation.video), visible=True)
        return {**opened, self.images: gr.Gallery(visible=False), self.video: video}

    def leave(self, request: gr.Request) -> None:
        """Delete what the visitor has uploaded: the page was closed or loaded anew."""
        self.uploads.leave(request.session_hash or "")

    def ask(
        self,
        question: str,
        conversation: Conversation | None,
        task: str = "Ask",
        name: str = "",
    ) -> Iterator[Any]:
        """Answer a question, piece by piece.

        Args:
            name: Of the conversation in which it was asked: if another was started since, the question is refused.
                It is empty where the page does not show yet what was opened, which the question is about.
        """
        if conversation is None:
            yield self._message("Add an image or a video first. Ask once it is shown.")
            return
        if conversation.is_closed or (name and conversation.name != name):
            yield self._message(OPENING)
            return
        updates, message, last = conversation.answer(question, task), None, None
        asked = question.strip() if task == "Ask" else f"{task}: {question.strip()}"
        try:
            for update in updates:
                shown = _chat([*conversation.turns, (asked, None if last is None else update.text)])
                if update.note:  # the last one
                    conversation.turns.append((asked, update.text))
                if last is None:  # taken: from now on the field is for the next question
                    yield {self.chat: shown, self.question: "", self.status: gr.Markdown(visible=False)}
                else:
                    yield {self.chat: shown, self.raw: update.raw, **self._changed(update)}
                last = update
        except UserError as error:
            message = str(error)
        except Exception:
            log.exception("Answering %r failed.", question)
            message = FAILED
        finally:
            updates.close()  # stops the model when the user does
        if last is None and message is None:  # it was closed at this very moment
            yield self._message(OPENING)
        elif message is not None and not conversation.is_closed:
            yield {**self._message(message), **({} if last is None else {self.question: question})}
        yield gr.skip()  # gradio sends what came last once more when an answer ends

    def _changed(self, update: Update) -> dict[Any, Any]:
        """The components that an update changes besides the text."""
        changed: dict[Any, Any] = {}
        if update.images is not None:
            changed[self.images] = self._gallery(update.images)
        if update.video is not None:
            changed[self.video] = gr.Video(str(update.video), visible=True)
        if update.files is not None:
            changed |= self._exports(update.files)
        if update.note:  # the last one
            changed[self.note] = update.note
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
    def _gallery(images: Any) -> gr.Gallery:
        return gr.Gallery(list(images), columns=min(2, len(images)), visible=True)


def _chat(turns: Iterable[tuple[str, str | None]]) -> list[dict[str, str]]:
    """Questions and answers as messages with the text escaped; gradio would interpret its tags as HTML."""
    return [
        {"role": role, "content": html.escape(text, quote=False)}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
        if text is not None
    ]


def launch(
    page: Page,
    host: str,
    port: int,
    *,
    logins: list[tuple[str, str]] | None = None,
    hosts: Iterable[str] = (),
    share: bool = False,
    wait: bool = True,
) -> str:
    """Serve a page.

    Args:
        logins: Users and their passwords; without any, everybody is let in.
        hosts: Names that browsers know it by, besides addresses and those of this machine.
        share: Also serve it at a public address of gradio's.
        wait: Block until the process is interrupted; otherwise serve in the background.
    Returns:
        Its address.
    """
    if share and not logins:
        log.warning("Everybody on the internet who finds the public address is let in. Pass --login to change that.")
    names = {host, *own_names(), *hosts, *([SHARED] if share else [])}
    page.blocks.queue(default_concurrency_limit=MAX_QUESTIONS, max_size=MAX_WAITING)
    _, address, _ = page.blocks.launch(
        auth=logins or None,
        max_file_size=MAX_FILE_SIZE,
        server_name=host,
        server_port=port,
        share=share,
        app_kwargs={"middleware": [Middleware(CheckedHosts, names=names)]},
        prevent_thread_lock=not wait,
        allowed_paths=[str(DATA)],
        theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        quiet=not wait,
    )
    return address
