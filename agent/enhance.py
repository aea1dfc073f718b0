"""The last two stages of test-time scaling: each call is tried in other ways, then the text.

A policy that follows instructions is told what went wrong, or what the pictures show. One that only knows documents is
not lost either: it writes on from the place in question, and may do better. Whatever changes the plan of the document,
or does not raise its score, is not taken.
"""

from __future__ import annotations

from agent.document import provenance_text
from agent.protocol import Call, Text, parse
from agent.render import CallOutcome
from agent.workshop import Choices, Draft, Messages, Version, Workshop, call_key, plan_of

REPAIR = (
    "The picture {caption!r} of your answer, made with {source}, is not good: {fault}. Write its <imgen> tag again so "
    "that this is mended. Answer with that one tag."
)
POLISH = (
    "These are the pictures of your answer:\n{pictures}\nWrite the answer again so that its text agrees with what they "
    "show and reads better. Keep every <imgen> tag exactly as it is, in the same order."
)


async def enhance(shop: Workshop, now: Version, n: int) -> tuple[Version, list[str]]:
    """Each call in turn, in up to `n` ways; and what was changed."""
    changed: list[str] = []
    i = 0
    while i < len(now.document.calls):  # a tag that nobody could read may go
        call = now.document.calls[i]
        draft = _draft(now)
        tries: list[tuple[Draft, Choices]] = [(draft, {**now.choices, **other}) for other in _others(call, now, n)]
        if fault := call.reason or "; ".join(call.provenance.get("warnings", ())):
            tries += [(d, now.choices) for d in await _anew(shop, now, call, fault, n)]
        if (best := await shop.best(now, tries)) is not now:
            changed.append(_told(i, call, now, best))
            now = best
        i += 1
    return now, changed


async def polish(shop: Workshop, now: Version, n: int) -> tuple[Version, list[str]]:
    """The text around the calls, written anew up to `n - 1` times; and what was changed."""
    text, calls = now.document.text, now.document.calls
    shown = "\n".join(f"- {c.description}: {provenance_text(c) or c.source}" for c in calls if c.status == "ok")
    asked = _after(shop.messages, text, POLISH.format(pictures=shown or "- none"))
    tasks = [(asked, "")]
    if calls:
        tasks.append((shop.messages, text[: calls[-1].end]))
    drafts = await shop.drafts(tasks * (n - 1))
    same = [(d, now.choices) for d in drafts if _calls(d.text, shop) == _calls(text, shop)]
    best = await shop.best(now, same)
    return best, [] if best is now else [f"the text, {_rise(now, best)}"]


def _others(call: CallOutcome, now: Version, n: int) -> list[Choices]:
    """The same call with another hit or another seed, where its tool has such."""
    if call.status != "ok":
        return []
    varied = "seed" if "seed" in call.provenance else "rank" if call.source == "search" else ""
    key = call_key(call.source, call.params)
    return [{key: {**now.choices.get(key, {}), varied: k}} for k in range(1, n)] if varied else []


async def _anew(shop: Workshop, now: Version, call: CallOutcome, fault: str, n: int) -> list[Draft]:
    """Answers in which the call is written again, told what went wrong and not told, that keep the plan."""
    text = now.document.text
    asked = _after(shop.messages, text, REPAIR.format(caption=call.description, source=call.source, fault=fault))
    told = await shop.drafts([(asked, "")] * (n - 1))
    mended = [text[: call.start] + tag + text[call.end :] for d in told if (tag := _tag(d.text, call.source, shop))]
    wrote_on = await shop.drafts([(shop.messages, text[: call.start])] * (n - 1))
    drafts = [*(Draft(t, 0, now.document.finished) for t in dict.fromkeys(mended)), *wrote_on]
    wanted = plan_of(text, shop.specs)
    return [d for d in drafts if plan_of(d.text, shop.specs) == wanted]


def _tag(answer: str, source: str, shop: Workshop) -> str:
    """The first sound tag of that tool in an answer, or ""."""
    tags = [s for s in parse(answer, shop.specs) if isinstance(s, Call) and source in ("", s.source)]
    return answer[tags[0].start : tags[0].end] if tags else ""


def _after(messages: Messages, answer: str, said: str) -> Messages:
    """The conversation, the answer, and what is said to it."""
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": said}]


def _calls(text: str, shop: Workshop) -> list[str]:
    """Tags of a text, as what is called; malformed ones as they are."""
    segments = [s for s in parse(text, shop.specs) if not isinstance(s, Text)]
    return [call_key(s.source, s.params) if isinstance(s, Call) else text[s.start : s.end] for s in segments]


def _told(i: int, call: CallOutcome, old: Version, new: Version) -> str:
    """What became of a call, in a line."""
    same = new.document.text == old.document.text
    choices = [v for k, v in new.choices.items() if old.choices.get(k) != v]
    how = ", ".join(f"{k} {v}" for c in choices for k, v in c.items()) if same else "written anew"
    return f"call {i + 1} ({call.source}): {how}, {_rise(old, new)}"


def _rise(old: Version, new: Version) -> str:
    if old.score is None or new.score is None:
        return f"{old.faults} faults to {new.faults}"
    return f"score {old.score:.3f} to {new.score:.3f}"


def _draft(version: Version) -> Draft:
    return Draft(version.document.text, 0, version.document.finished)
