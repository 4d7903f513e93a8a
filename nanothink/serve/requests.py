"""What clients may ask, field by field, as OpenAI's API names it, with a few more fields of vLLM's."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from nanothink.inference.sampling import SamplingConfig
from nanothink.serve.errors import RequestError

MAX_CHOICES = 128
MAX_LIKELIEST = 20
CHAT_TOKENS = 512
"""Written in answer to a chat that sets no limit; a small model rarely ends a text by itself."""

_Token = Annotated[int, Field(ge=0, lt=1 << 31)]
_Stop = Annotated[str, Field(min_length=1, max_length=1000)]
_Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]


def _only(*neutral: Any) -> Callable[[Any], Any]:
    """Validator of a field that would change the answer: it may be empty, or have a value that does not."""

    def checked(value: Any) -> Any:
        if value and value not in neutral:
            raise ValueError("is not supported here; leave it out")
        return value

    return checked


_Unsupported = Annotated[Any, AfterValidator(_only())]
_Ignored = Any
"""A field of OpenAI's API that cannot change the text: accepted, whatever it holds."""


class _Request(BaseModel):
    """A body. A field that it does not know is an error: a misspelt one would change the answer unseen."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class _OfModel(_Request):
    model: str | None = Field(None, max_length=1000)
    """One of GET /v1/models; the first when left out."""


class StreamOptions(_Request):
    include_usage: bool | None = None
    """End the stream with the numbers of tokens."""
    include_obfuscation: _Ignored = None


class GenerationRequest(_OfModel):
    """The fields that both ways to write text have."""

    default_tokens: ClassVar[int]

    max_tokens: int | None = Field(None, ge=0)
    """Tokens to write at most. Default: 16 for completions, 512 for chats."""
    temperature: float | None = Field(None, ge=0, le=100)
    """0 always takes the likeliest token. Default: 1."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Draw from the fewest tokens whose probabilities reach this sum. Default: 1."""
    top_k: int | None = Field(None, ge=-1)
    """Draw from the k likeliest tokens; all when 0, -1 or left out."""
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    """Above 1, recent tokens become less likely."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Texts for each prompt. The i-th is drawn with seed + i."""
    seed: _Seed | None = None
    """The same seed gives the same text, whoever else is being served."""
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    """The text ends where one of these begins."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    """Write on past the end of a document."""
    return_weights: bool | None = None
    """Give the tokens, and how far each of a combined model's components was trusted for each of them."""
    user: _Ignored = None
    metadata: _Ignored = None
    service_tier: _Ignored = None
    store: _Ignored = None
    logit_bias: _Unsupported = None
    presence_penalty: _Unsupported = None
    frequency_penalty: _Unsupported = None

    @property
    def n_choices(self) -> int:
        return self.n or 1

    @property
    def tokens_wanted(self) -> int:
        return self.default_tokens if self.max_tokens is None else self.max_tokens

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, choice: int) -> SamplingConfig:
        """The settings of the i-th choice of a prompt."""
        return SamplingConfig(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=None if self.top_p is None else max(self.top_p, 1e-9),
            top_k=max(0, self.top_k or 0),
            repetition_penalty=self.repetition_penalty or 1.0,
            max_new_tokens=max(1, self.tokens_wanted),
            stop_at_eos=not self.ignore_eos,
            seed=None if self.seed is None else (self.seed + choice) % (1 << 63),
        )


class CompletionRequest(GenerationRequest):
    default_tokens: ClassVar[int] = 16

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[_Token], Field(min_length=1)]
        | Annotated[list[Annotated[list[_Token], Field(min_length=1)]], Field(min_length=1)]
    )
    """A text, token ids, or a list of either."""
    echo: bool | None = None
    """Give the prompt back before the text; with logprobs, its tokens are scored too."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LIKELIEST)
    """Log-probability of each token, and so many of the likeliest."""
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """May only say what n says."""
    suffix: _Unsupported = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(_Request, extra="ignore"):
    type: Literal["text"]
    text: str


class Message(_Request, extra="ignore"):
    role: str = Field(max_length=100)
    content: str | list[TextPart] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(GenerationRequest):
    default_tokens: ClassVar[int] = CHAT_TOKENS

    messages: list[Message] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: int | None = Field(None, ge=0)
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Log-probability of each token."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LIKELIEST)
    """And so many of the likeliest."""
    parallel_tool_calls: _Ignored = None
    prediction: _Ignored = None
    prompt_cache_key: _Ignored = None
    prompt_cache_options: _Ignored = None
    prompt_cache_retention: _Ignored = None
    safety_identifier: _Ignored = None
    audio: _Unsupported = None
    function_call: Annotated[Any, AfterValidator(_only("none", "auto"))] = None
    functions: _Unsupported = None
    modalities: Annotated[Any, AfterValidator(_only(["text"]))] = None
    moderation: _Unsupported = None
    reasoning_effort: Annotated[Any, AfterValidator(_only("none"))] = None
    response_format: Annotated[Any, AfterValidator(_only({"type": "text"}))] = None
    tool_choice: Annotated[Any, AfterValidator(_only("none", "auto"))] = None
    tools: _Unsupported = None
    verbosity: Annotated[Any, AfterValidator(_only("medium"))] = None
    web_search_options: _Unsupported = None

    @property
    def tokens_wanted(self) -> int:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return super().tokens_wanted


class TokenizeRequest(_OfModel):
    prompt: str
    """A text; the text of the end-of-document token alone is that token."""
    add_special_tokens: _Ignored = None
    """The tokenizer adds none."""


class DetokenizeRequest(_OfModel):
    tokens: list[_Token]


class InspectRequest(_OfModel):
    """What the model predicts after a text, and where it has read the like."""

    prompt: str = ""
    tokens: list[_Token] = Field(default_factory=list)
    """Token ids that follow the text."""
    n_likeliest: int = Field(10, ge=1, le=MAX_LIKELIEST)
    n_passages: int = Field(8, ge=0, le=64)


_R = TypeVar("_R", bound=_Request)


def parse(kind: type[_R], body: Any) -> _R:
    """A body as a request.

    Raises:
        RequestError: which names the first field that is wrong, an unknown one before others.
    """
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    names = [f"{part:.100}" if isinstance(part, str) else str(part) for part in first["loc"]]
    where, field = ".".join(names) or "the body", names[0] if names else None
    if first["type"] == "extra_forbidden":
        known = StreamOptions if len(names) > 1 else kind
        near = difflib.get_close_matches(names[-1], known.model_fields, 1)
        hint = f"did you mean {near[0]}?" if near else "/openapi.json lists those that there are."
        raise RequestError(f"{where}: unknown field; {hint}", param=field, code="unknown_parameter")
    raise RequestError(f"{where}: {first['msg'].removeprefix('Value error, ')}", param=field)
