"""From messages to token ids, and which of those ids the assistant wrote.

A template writes text, and text is where chat goes wrong. Four rules:

1. Templates run in another process under hard limits (template_worker.py).
2. A control token counts only where the template wrote it. Control-token text inside messages or tools is framed with
   two noncharacters before rendering and encoded as plain text after. (transformers 5 does this as
   `sanitize_control_tokens=True`; by default it parses them, so `<|im_end|>` in a user's message ends the turn.)
3. The mask of assistant tokens comes from rendering the conversation up to each border, never from searching for text
   (the same words may stand in the question), or from the template's own `{% generation %}` blocks.
4. Text is cut at the start of each answer before it is tokenized. A generation prompt ends there when the model is
   used, so training must see the same split. The ids equal `apply_chat_template`'s unless the tokenizer would have
   joined characters across that border (an answer that starts with newlines after ChatML's `assistant\\n`).

BOS comes exactly once: from the template, or from the tokenizer when the model uses one and the template has none
(where transformers would give none).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bildung.core.errors import ChatTemplateError
from bildung.tokens.template_process import render_all
from bildung.tokens.template_worker import GENERATION_END, GENERATION_START

if TYPE_CHECKING:
    from bildung.tokens.tokenizer import Tokenizer

Message = Mapping[str, Any]
Span = tuple[int, int]  # characters [start, end) of a rendered text

CONTROL_START, CONTROL_END = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"([{CONTROL_START}{CONTROL_END}{GENERATION_START}{GENERATION_END}])")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Rendered(NamedTuple):
    """A rendered conversation: its text, where data spelled control tokens, and where `{% generation %}` stood."""

    text: str
    quoted: list[Span]
    generated: list[Span]


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **special_tokens: str,
) -> str:
    """The text that `template` makes of `messages`; `special_tokens` are `bos_token="<s>"` and so on.

    add_generation_prompt: end with the header after which the assistant speaks.
    Raises ChatTemplateError when the template fails, refuses the messages or is stopped at a limit.
    """
    check_messages(messages)
    variables: dict[str, Any] = {**special_tokens, "messages": list(messages), "tools": tools, "documents": None}
    variables["add_generation_prompt"] = add_generation_prompt
    return read_marks(render_all(template, [variables])[0]).text


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a conversation, BOS once, control tokens only from the template.

    Raises ChatTemplateError when the tokenizer has no template or the template fails.
    """
    (rendered,) = render_marked(tokenizer, [(messages, add_generation_prompt)], tools)
    return _encode(tokenizer, rendered, [])[0]


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole conversation and, for each, whether the assistant wrote it (end-of-turn token included).

    Raises ChatTemplateError when the template is not prefix-preserving, i.e. when a later message changes how an
    earlier one is rendered (Qwen3 drops the reasoning of earlier turns): what the model was shown would then not be
    what it is trained on.
    """
    check_messages(messages)
    if tokenizer.chat_template is not None and _GENERATION_TAG.search(tokenizer.chat_template):
        (whole,) = render_marked(tokenizer, [(messages, False)], tools)
        return _encode(tokenizer, whole, whole.generated)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    jobs: list[tuple[Sequence[Message], bool]] = [(messages, False)]
    for i in turns:
        jobs += [(messages[:i], True), (messages[: i + 1], False)]
    whole, *borders = render_marked(tokenizer, jobs, tools)
    answers: list[Span] = []
    for i, before, after in zip(turns, borders[::2], borders[1::2], strict=True):
        for part, what in ((before.text, "the prompt of"), (after.text, "the conversation up to")):
            if not whole.text.startswith(part):
                raise ChatTemplateError(
                    f"the chat template is not prefix-preserving: {what} message {i} (assistant) is rendered as "
                    f"{_difference(part, whole.text)}. Train on one answer per conversation, start with a "
                    "user message, or mark answers with {% generation %} in the template."
                )
        start, stop = len(before.text), len(after.text)
        ends = [m.end() for m in _control_tokens(tokenizer, whole) if start <= m.start() and m.end() <= stop]
        answers.append((start, max(ends, default=stop)))  # ChatML's newline after <|im_end|> is not the model's
    return _encode(tokenizer, whole, answers)


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The control token that the template writes right after an assistant's answer, or None."""
    probe = "The probe's answer."
    (rendered,) = render_marked(
        tokenizer, [([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": probe}], False)], None
    )
    _, found, rest = rendered.text.rpartition(probe)
    match = tokenizer.control_pattern.match(rest.lstrip())
    return tokenizer.id_of(match.group()) if found and match else None


def check_messages(messages: Sequence[Message]) -> None:
    """Raises ChatTemplateError unless every message is an object with a role."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ChatTemplateError(
                f"message {i} is {str(message)[:80]!r}; an object with 'role' (system, user, assistant, tool) and "
                "'content' is expected."
            )


def render_marked(
    tokenizer: Tokenizer,
    jobs: Sequence[tuple[Sequence[Message], bool]],
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[Rendered]:
    """Renders (messages, add_generation_prompt) pairs with the control tokens in the data marked."""
    if tokenizer.chat_template is None:
        raise ChatTemplateError(
            "this tokenizer has no chat template (a base model?). "
            "Put one into chat_template.jinja beside tokenizer.json."
        )
    names = {name: token for name, token in tokenizer.named.items() if token is not None}
    plain, marked = [], []
    for messages, add_generation_prompt in jobs:
        check_messages(messages)
        data = {"messages": list(messages), "tools": tools}
        rest = {**names, "documents": None, "add_generation_prompt": add_generation_prompt}
        plain.append({**data, **rest})
        marked.append({**mark(data, tokenizer.control_pattern), **rest})
    if plain == marked:
        return [read_marks(text) for text in render_all(tokenizer.chat_template, plain)]
    texts = render_all(tokenizer.chat_template, marked + plain)
    rendered = [read_marks(text) for text in texts[: len(jobs)]]
    for with_marks, text in zip(rendered, texts[len(jobs) :], strict=True):
        if with_marks.text != read_marks(text).text:
            raise ChatTemplateError(
                "a message contains the text of a control token, and the chat template rewrites that message, so the "
                "token cannot be kept apart from the template's own. Remove the control token from the message."
            )
    return rendered


def mark(value: Any, control_tokens: re.Pattern[str]) -> Any:
    """`value` with every control-token text in its strings framed by CONTROL_START and CONTROL_END."""
    if isinstance(value, str):
        if _MARKS.search(value):
            raise ChatTemplateError(
                "a message contains one of the noncharacters U+FDD0 to U+FDD3, which are reserved here as marks "
                "(Unicode never assigns them). Remove it."
            )
        return control_tokens.sub(lambda match: CONTROL_START + match.group() + CONTROL_END, value)
    if isinstance(value, Mapping):
        return {mark(key, control_tokens): mark(item, control_tokens) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mark(item, control_tokens) for item in value]
    return value


def read_marks(marked: str) -> Rendered:
    """The text without marks, and the spans they framed. Raises ChatTemplateError for a mark without its partner."""
    pieces: list[str] = []
    spans: dict[str, list[Span]] = {CONTROL_START: [], GENERATION_START: []}
    partner = {CONTROL_END: CONTROL_START, GENERATION_END: GENERATION_START}
    opened: dict[str, int] = {}
    at = 0
    for piece in _MARKS.split(marked):
        if piece in spans and piece not in opened:
            opened[piece] = at
        elif piece in partner and partner[piece] in opened:
            spans[partner[piece]].append((opened.pop(partner[piece]), at))
        elif piece in spans or piece in partner:
            opened[piece] = at  # out of order: reported below
            break
        else:
            pieces.append(piece)
            at += len(piece)
    if opened:
        raise ChatTemplateError(
            "the chat template cuts a message inside the text of a control token, nests {% generation %} blocks or "
            "drops the end of one. Remove control tokens from the messages, or repair the template."
        )
    return Rendered("".join(pieces), spans[CONTROL_START], spans[GENERATION_START])


def _control_tokens(tokenizer: Tokenizer, rendered: Rendered) -> list[re.Match[str]]:
    """The control tokens the template itself wrote."""
    starts = {start for start, _ in rendered.quoted}
    return [match for match in tokenizer.control_pattern.finditer(rendered.text) if match.start() not in starts]


def _encode(tokenizer: Tokenizer, rendered: Rendered, answers: Sequence[Span]) -> tuple[list[int], list[bool]]:
    """Ids and answer mask. The text is cut at answers and around quoted control tokens; pieces are encoded apart."""
    quoted = set(rendered.quoted)
    cuts = sorted({0, len(rendered.text), *(i for span in [*answers, *rendered.quoted] for i in span)})
    ids: list[int] = []
    mask: list[bool] = []
    for start, stop in itertools.pairwise(cuts):
        piece = rendered.text[start:stop]
        specials = (start, stop) not in quoted
        if ids:
            new = tokenizer.encode_inside(piece, after=ids[-1], specials=specials)
        else:
            new = tokenizer.encode(piece, specials=specials)
        ids += new
        mask += [any(a <= start and stop <= b for a, b in answers)] * len(new)
    return ids, mask


def _difference(part: str, whole: str) -> str:
    """Where two texts part, as a phrase."""
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return f"{part[at : at + 40]!r} at character {at} on its own, and {whole[at : at + 40]!r} in the whole"
