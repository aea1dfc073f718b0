"""What the tools of remote picture services share: one picture drawn, or given ones edited, for so many dollars."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from PIL import Image

from agent.spec import PUBLISHED, ToolSpec
from replay.record import Blob
from tools.base import ToolResult
from tools.drawing import draw_spec, edit_spec, read_wish, sources
from tools.picture import encode
from tools.remote import Service

LONGEST_SIDE = 2048  # pixels of a picture that is sent


class ServiceTool(ABC):
    """Draws what a prompt says, or edits the pictures pointed at, by a remote service.

    Args:
        model: as the service names it.
        edits: whether a call points at pictures to edit.
        references: pictures that an editing call may point at, at most; above 1, `img_index` is a list.
        size: of the picture, as the service writes sizes; None is the service's own.
        url: of the service, up to the paths.
        timeout_s: of a whole call; the pool's `timeout_s` should be above it.
        dollars: what a picture costs.
        extra: further fields of the request, as the service's documentation names them; null takes one away.

    Raises:
        ValueError: the key is missing, or an option makes no sense.
    """

    spec: ToolSpec = PUBLISHED["diffusion"]
    service: ClassVar[str]
    home: ClassVar[str]
    key_variable: ClassVar[str]

    def __init__(
        self,
        model: str,
        edits: bool = False,
        references: int = 1,
        size: str | None = None,
        url: str | None = None,
        timeout_s: float = 120.0,
        dollars: float = 0.0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        if dollars < 0:
            raise ValueError(f"dollars of {self.service} must not be negative, but {dollars}")
        self.spec = self.describe(edits=edits, references=references)
        self._model, self._edits, self._references, self._size = model, edits, references, size
        self._dollars, self._extra = dollars, dict(extra or {})
        needs_key = url is None or url.rstrip("/") == self.home
        self._service = Service(self.service, url or self.home, self.key_variable, needs_key, timeout_s)

    @classmethod
    def describe(cls, edits: bool = False, references: int = 1, **options: Any) -> ToolSpec:
        """The spec of a tool with these options. Raises ValueError for several references of a tool that edits none."""
        if references > 1 and not edits:
            raise ValueError(f"references of {cls.service} above 1 need edits: true")
        return edit_spec(references) if edits else draw_spec()

    def run(self, params: Mapping[str, Any], images: Sequence[Blob] = ()) -> ToolResult:
        """Ask for one picture; provenance: `maker`, `model`, `source` (the service's host), and `of` for an edit.

        Raises:
            CallFailed: the service refuses the content, or a picture to edit cannot be read.
            ServiceFailed: the service or its configuration failed.
        """
        prompt = read_wish(params).prompt
        given = [_sent(image) for image in sources(images, self._references)] if self._edits else []
        made = self._ask(prompt, given)
        of = {"of": [image.sha256 for image in images]} if self._edits else {}
        return ToolResult((made,), {"maker": self._model, "model": self._model, "source": self._service.host} | of)

    @abstractmethod
    def _ask(self, prompt: str, images: Sequence[bytes]) -> Blob:
        """The picture for a prompt and PNGs."""

    def _fields(self, **asked: Any) -> dict[str, Any]:
        """The request's fields; the config's own go last, and None takes one away."""
        fields = {"model": self._model, "size": self._size} | asked | self._extra
        return {key: value for key, value in fields.items() if value is not None}

    def cost(self, params: Mapping[str, Any]) -> float:
        """US dollars of a call."""
        return self._dollars

    def close(self) -> None:
        self._service.close()


def _sent(image: Image.Image) -> bytes:
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return encode(image)
