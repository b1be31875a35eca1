"""The bodies of OpenAI's chat completions, as far as they are served. What is known and not served is refused by name;
fields that nobody knows here are passed over, as OpenAI's own servers do."""

import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_STOPS = 4
# Field -> what it may be set to, which asks for nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
}


class TextPart(BaseModel):
    """Words within a message."""

    type: Literal["text"]
    text: str


class ImageURL(BaseModel):
    """Where an image is: in the URL itself."""

    url: str = Field(description="data:image/png;base64,...; remote and file URLs are refused")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(BaseModel):
    """An image within a message."""

    type: Literal["image_url"]
    image_url: ImageURL


class Message(BaseModel):
    """What one side says."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class ChatRequest(BaseModel):
    """A conversation to be answered."""

    model_config = ConfigDict(extra="allow")

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MOST_STOPS or "" in stops:
            raise ValueError(f"at most {MOST_STOPS} texts, none of them empty")
        return stops

    @model_validator(mode="after")
    def _check_served(self) -> "ChatRequest":
        given = self.model_extra or {}
        asked = [name for name, nothing in NOT_SERVED.items() if name in given and given[name] not in nothing]
        if asked:
            raise ValueError(f"{asked[0]} is not served; leave it out")
        return self

    @property
    def most_tokens(self) -> int | None:
        """How long the answer may be at most."""
        return self.max_completion_tokens or self.max_tokens


class PromptTokensDetails(BaseModel):
    """Of the tokens of a conversation, those that were not read again."""

    cached_tokens: int


class Usage(BaseModel):
    """What an answer took. `state_bytes`, ours alone: what the model keeps of the conversation behind it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    state_bytes: int


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


def _new_id() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


class _Completion(BaseModel):
    id: str = Field(default_factory=_new_id)
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str


class ChatCompletion(_Completion):
    """An answer."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What a piece of a streamed answer adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of the one answer."""

    index: int = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(_Completion):
    """A piece of a streamed answer."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "cobra"


class ModelList(BaseModel):
    """All of them, which is one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's form of an error."""

    error: ErrorBody
