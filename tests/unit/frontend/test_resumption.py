"""Answers that go on at other workers: the same tokens, text, ends and counts as if no worker had been lost.

The engine here is a language model of a few lines whose logits follow from all tokens before, with vLLM's sampling:
penalties that count output apart from prompt, a random stream for each seed, a minimum before stop tokens. Hypothesis
chooses where the workers are lost.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from frontend.answer_text import AnswerText
from frontend.attempt import Attempt, Job
from frontend.generation import TokenDelta, TokenRequest
from frontend.progress import Progress, ReplayDiverged
from frontend.resumption import Way, continuable, way
from frontend.router import Route
from frontend.tokenizer import TextModel
from frontend.worker_failure import FailureKind, WorkerFailure
from slipstream.errors import WorkerLostError
from slipstream.v1.registry_pb2 import Role, WorkerRecord
from slipstream.v1.sampling_pb2 import Candidate as TokenCandidate
from slipstream.v1.sampling_pb2 import FinishReason, RequestAccount, SamplingParams, TokenLogprobs
from slipstream.v1.worker_pb2 import DecodeEvent, PromptComputed
from tests.support.text_model_folder import byte_level_tokenizer

MODEL = TextModel(byte_level_tokenizer())
WORDS = MODEL.encode_now("abcdefgh", add_special_tokens=False)
STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH
PROMPT = [WORDS[0], WORDS[3], WORDS[0]]
MOST = 14


def generate(prompt: Sequence[int], sampling: SamplingParams) -> Iterator[DecodeEvent]:
    """One engine's answer, a token an event."""
    output: list[int] = []
    draws = random.Random(sampling.seed) if sampling.HasField("seed") else random.Random()
    greedy = sampling.HasField("temperature") and sampling.temperature == 0
    while True:
        logits = _penalized(prompt, output, sampling)
        if len(output) < sampling.min_tokens:
            logits = {token: logit for token, logit in logits.items() if token not in sampling.stop_token_ids}
        noise = {token: 0.0 if greedy else draws.expovariate(1.0) for token in WORDS}
        token = max(logits, key=lambda one: logits[one] + noise[one])
        output.append(token)
        event = DecodeEvent(token_ids=[token])
        event.logprobs.append(
            TokenLogprobs(chosen=TokenCandidate(token_id=token, logprob=_raw(prompt, output[:-1])[token]))
        )
        if token in sampling.stop_token_ids and len(output) >= sampling.min_tokens:
            event.finish_reason, event.stop_reason = STOP, str(token)
        elif len(output) == sampling.max_tokens:
            event.finish_reason = LENGTH
        if event.finish_reason:
            event.account.CopyFrom(RequestAccount(decode_computed_tokens=1))
        yield event
        if event.finish_reason:
            return


def _raw(prompt: Sequence[int], output: Sequence[int]) -> dict[int, float]:
    context = random.Random(repr([*prompt, *output]))
    return {token: context.uniform(-2, 2) for token in WORDS}


def _penalized(prompt: Sequence[int], output: Sequence[int], sampling: SamplingParams) -> dict[int, float]:
    logits = {token: logit + sampling.logit_bias.get(token, 0.0) for token, logit in _raw(prompt, output).items()}
    counts = Counter(output)
    repetition = sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0
    for token in {*prompt, *output} & logits.keys():
        logits[token] = logits[token] / repetition if logits[token] > 0 else logits[token] * repetition
    for token, count in counts.items():
        logits[token] -= sampling.frequency_penalty * count + sampling.presence_penalty
    return logits


@dataclass
class Told:
    """What a face got of one answer."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    offsets: list[int] = field(default_factory=list)
    completion_tokens: int = 0
    ending: tuple[int, str] = (0, "")
    account: RequestAccount | None = None
    ways: list[Way] = field(default_factory=list)


Engine = Callable[[Sequence[int], SamplingParams], Iterator[DecodeEvent]]


def answered(sampling: SamplingParams, stop: Sequence[str], seams: Sequence[int], engine: Engine = generate) -> Told:
    """An answer whose n-th worker is lost after `seams[n]` events."""
    told, text = (
        Told(),
        AnswerText(
            MODEL.detokenizer(),
            stop=stop,
            min_tokens=sampling.min_tokens,
            stop_token_ids=frozenset(sampling.stop_token_ids),
        ),
    )
    progress = Progress(TokenRequest("r", "m", PROMPT, sampling), 3, 1e9, max_migrations=len(seams))
    ends = iter(seams)
    while True:
        attempt = an_attempt(progress)
        if progress.generated:
            told.ways.append(progress.way)
        try:
            for delta in _deltas(progress, attempt, engine, next(ends, None)):
                told.tokens += delta.token_ids
                told.logprobs += [one.chosen.logprob for one in delta.logprobs]
                piece = text.feed(delta)
                told.text += piece.text
                told.offsets += [token.text_offset for token in piece.shown]
                told.account = delta.account or told.account
                if piece.finished:
                    told.ending, told.completion_tokens = (
                        (piece.finish_reason, piece.stop_reason),
                        text.completion_tokens,
                    )
                    return told
        except ReplayDiverged:
            continue
        if progress.attempts > 1:
            progress.note_recomputed(attempt)
        assert progress.finished_unsaid() is None
        progress.failed(WorkerFailure(attempt.route.decode, FailureKind.LOST, WorkerLostError("killed")))


def an_attempt(progress: Progress) -> Attempt:
    progress.attempts += 1
    job = progress.job()
    decode = WorkerRecord(worker_id=f"d{progress.attempts}", role=Role.ROLE_DECODE, epoch=1)
    computed = PromptComputed(computed_tokens=len(job.token_ids) - 1, cached_tokens=1)
    route = Route(decode, WorkerRecord(worker_id=f"p{progress.attempts}"), "a test")
    known: Any = SimpleNamespace(route=route, job=job, computed=computed, prefill_s=0.5, decode_computed_tokens=None)
    return cast("Attempt", known)


def _deltas(progress: Progress, attempt: Attempt, engine: Engine, end: int | None) -> Iterator[TokenDelta]:
    job: Job = attempt.job
    for number, event in enumerate(engine(job.token_ids, job.sampling)):
        if number == end:
            return
        delta = progress.accept(event, attempt)
        if delta is not None:
            yield delta


def penalties() -> st.SearchStrategy[float]:
    return st.sampled_from([0.0, 0.25, 1.5])


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    sampling = SamplingParams(max_tokens=draw(st.integers(1, MOST)), temperature=draw(st.sampled_from([0.0, 1.0])))
    sampling.min_tokens = draw(st.integers(0, sampling.max_tokens))
    sampling.stop_token_ids.extend(draw(st.lists(st.sampled_from(WORDS), max_size=2, unique=True)))
    sampling.presence_penalty = draw(penalties())
    sampling.frequency_penalty = draw(penalties())
    sampling.repetition_penalty = draw(st.sampled_from([1.0, 1.0, 1.3]))
    if draw(st.booleans()):
        sampling.logit_bias[draw(st.sampled_from(WORDS))] = draw(st.sampled_from([-3.0, 3.0]))
    if sampling.temperature or draw(st.booleans()):
        sampling.seed = draw(st.integers(-(1 << 63), (1 << 63) - 1))
    return sampling


def stops() -> st.SearchStrategy[list[str]]:
    return st.lists(st.text("abcdefgh", min_size=1, max_size=3), max_size=2)


def seams() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, MOST - 1), max_size=4)


@given(samplings(), stops(), seams())
def test_where_workers_are_lost_does_not_show_in_the_answer(
    sampling: SamplingParams, stop: list[str], seams: list[int]
) -> None:
    whole = answered(sampling, stop, [])
    # A worker that is lost after its last token has nothing left to be continued: see finished_unsaid.
    broken = answered(sampling, stop, [one for one in seams if one < len(whole.tokens)])
    assert broken.tokens == whole.tokens
    assert broken.logprobs == whole.logprobs
    assert (broken.text, broken.offsets) == (whole.text, whole.offsets)
    assert (broken.ending, broken.completion_tokens) == (whole.ending, whole.completion_tokens)
    assert Way.APPROXIMATED not in broken.ways
    if whole.account is not None and broken.account is not None:
        for name in ("prompt_tokens", "prefill_computed_tokens", "prefill_cached_tokens", "decode_computed_tokens"):
            assert getattr(broken.account, name) == getattr(whole.account, name), name


@given(samplings(), seams())
def test_a_replay_that_comes_to_other_tokens_goes_on_from_those_that_were_sent(
    sampling: SamplingParams, seams: list[int]
) -> None:
    whole = answered(sampling, [], [])
    calls = 0

    def another(prompt: Sequence[int], asked: SamplingParams) -> Iterator[DecodeEvent]:
        """Each engine of a kind of its own, so that no replay succeeds."""
        nonlocal calls
        calls += 1
        return generate(prompt if calls == 1 else [WORDS[calls % len(WORDS)], *prompt], asked)

    told = answered(sampling, [], [one for one in seams if one < len(whole.tokens)][:1], another)
    assert len(told.tokens) <= sampling.max_tokens
    assert told.ending[0] == STOP or len(told.tokens) == sampling.max_tokens
    assert told.completion_tokens == len(told.tokens)
    assert not any(token in sampling.stop_token_ids for token in told.tokens[sampling.min_tokens : -1])


@given(samplings())
def test_an_answer_with_nothing_but_its_tokens_to_remember_is_continued_not_made_again(
    sampling: SamplingParams,
) -> None:
    sampling.presence_penalty = sampling.frequency_penalty = 0.0
    if sampling.temperature:
        sampling.ClearField("seed")
    assert continuable(sampling)
    assert way(sampling, reproducible=True) is Way.CONTINUED


def test_random_answers_whose_penalties_cannot_be_carried_over_are_approximated() -> None:
    sampling = SamplingParams(max_tokens=8, temperature=1.0, presence_penalty=1.0)
    assert way(sampling, reproducible=True) is Way.APPROXIMATED
    told = answered(sampling, [], [3])
    assert len(told.tokens) == 8
    assert told.ways == [Way.APPROXIMATED]


def test_what_was_computed_again_is_told_apart_from_what_the_prompt_cost() -> None:
    told = answered(SamplingParams(max_tokens=8, temperature=0.0), [], [3, 2])
    assert told.account is not None
    assert (told.account.prompt_tokens, told.account.prefill_computed_tokens) == (3, 2)
    # Second attempt: 3 + 3 tokens but the last; the third 3 + 5.
    assert told.account.recomputed_tokens == 5 + 7
    assert told.account.prefill_worker == "p1"
    assert told.account.decode_worker == "d3"
    assert (told.account.attempts, told.account.migrations) == (3, 2)
