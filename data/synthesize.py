"""More rooms from a large model: `python -m data.synthesize --url http://… --model NAME --output more.jsonl`.

Any OpenAI-compatible endpoint (--url) or inference provider of the Hub (--provider). Each answer is checked,
compared with all others, and appended at once; the same command asks only for what is missing. The file goes
straight into `finetune.py --data dungeons more.jsonl`. The key is read from an environment variable and is
neither stored nor shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import AsyncInferenceClient, constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from data.dungeon_files import BUNDLED_DUNGEONS, read_json_lines
from data.room_requests import Request, Seen, requests, split_answer, what_is_wrong

RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_REFUSAL = 300  # characters of what an endpoint says about one
# So many requests in a row that fail for good mean that the endpoint has, not the requests.
FAILURES_THAT_END_A_RUN = 5
TOKENS_A_WORD = 1.4  # of English prose, about, in the vocabularies of large models; for the estimate only


class EndpointFailed(RuntimeError):
    """The endpoint gives no more answers; the message is for whoever asked."""


class NoAnswer(RuntimeError):
    """One request got no answer, after all tries."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote, at which try of its request over all runs, and the seed that was sent with it."""

    text: str
    attempt: int
    seed: int


@dataclass
class Tally:
    """What this run has asked for and got. `dropped` counts answers that would not do, by reason."""

    kept: int = 0
    asked: int = 0
    failed: int = 0
    failed_in_a_row: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    retries: Counter[str] = field(default_factory=Counter)

    def usd(self, arguments: argparse.Namespace) -> str:
        """What the tokens cost, in words."""
        if arguments.usd_per_million_in is None:
            return "cost unknown without prices (--usd_per_million_in, --usd_per_million_out)"
        spend = (
            self.prompt_tokens * arguments.usd_per_million_in
            + self.completion_tokens * arguments.usd_per_million_out
        ) / 1e6
        return f"${spend:,.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    bundled = [room for split in sorted(BUNDLED_DUNGEONS.glob("*.jsonl")) for room in read_json_lines(split)]
    try:
        rooms = read_json_lines(arguments.rooms)
        wanted = list(requests(rooms, arguments.count, arguments.seed))
        done = read_answers(arguments.output)
        texts = [row["description"] for row in done.values() if row.get("description")]
        rejected = read_answers(rejected_file(arguments.output))
    except (ValueError, OSError) as error:
        print(f"data.synthesize: {error}", file=sys.stderr)
        return 2
    missing = [r for r in wanted if r.id not in done and (r.id not in rejected or arguments.retry_dropped)]
    print(estimate(missing, len(wanted), arguments), flush=True)
    if arguments.plan or not missing:
        return 0
    if arguments.url:
        # Offline mode is about the Hub; this address was given by hand, and may well be this machine.
        constants.HF_HUB_OFFLINE = False
    tally = Tally()
    problem = ""
    # A rejected answer's seed is not sent again: an endpoint that heeds it would repeat the answer.
    tried = {id: row["attempt"] + 1 for id, row in rejected.items() if "attempt" in row}
    seen = Seen([*(room.description for room in bundled), *texts])
    try:
        asyncio.run(ask_all(missing, tried, seen, arguments, tally))
    except EndpointFailed as error:
        problem = str(error)
    except KeyboardInterrupt:
        problem = "interrupted"
    print(summary(tally, arguments))
    left = len(missing) - tally.kept - tally.dropped.total()
    if left:
        why = problem or f"{tally.failed} requests got no answer"
        print(
            f"data.synthesize: {why}. {tally.kept} answers of this run are kept in {arguments.output}; "
            f"{left} are missing. The same command goes on with those.",
            file=sys.stderr,
        )
        return 1
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m data.synthesize",
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", help="endpoint, such as http://127.0.0.1:8000/v1")
    where.add_argument("--provider", help="inference provider of the Hub, such as together; auto chooses one")
    parser.add_argument("--model", required=True, help="the teacher's name there")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; continued if it exists")
    parser.add_argument("--license", required=True, help="of the teacher's texts; recorded with each row")
    parser.add_argument("--count", type=int, default=1000, help="rooms to ask for (%(default)s)")
    parser.add_argument(
        "--rooms", type=Path, default=BUNDLED_DUNGEONS / "train.jsonl", help="whose fields are recombined"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the grid and of sampling (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=8, help="requests at a time (%(default)s)")
    parser.add_argument(
        "--attempts", type=int, default=6, help="for a request, pauses doubling (%(default)s)"
    )
    parser.add_argument("--pause_seconds", type=float, default=1.0, help="the first pause (%(default)s)")
    parser.add_argument("--timeout_seconds", type=float, default=120.0)
    parser.add_argument("--max_tokens", type=int, default=320)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.95)
    parser.add_argument("--usd_per_million_in", type=float, help="price of a prompt's tokens")
    parser.add_argument("--usd_per_million_out", type=float, help="price of an answer's tokens")
    parser.add_argument("--key_variable", help="environment variable of the key (OPENAI_API_KEY or HF_TOKEN)")
    parser.add_argument("--retry_dropped", action="store_true", help="ask again for what was dropped before")
    parser.add_argument("--plan", action="store_true", help="estimate tokens and money, ask nothing")
    arguments = parser.parse_args(argv)
    for name in ("count", "concurrency", "attempts", "max_tokens"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if (arguments.usd_per_million_in is None) != (arguments.usd_per_million_out is None):
        parser.error("--usd_per_million_in and --usd_per_million_out belong together; free is 0")
    if arguments.url and not arguments.url.startswith(("http://", "https://")):
        parser.error(f"--url {arguments.url} is no http(s) address")
    return arguments


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """Rows of an output file by id. A last line that a kill cut short is removed from the file.

    Raises:
        ValueError: if another line is not a row of ours.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    rows = {}
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], start=1):  # no other line end
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is no answer of an earlier run ({error}); name another"
            ) from error
    return rows


def rejected_file(output: Path) -> Path:
    return output.with_name(f"{output.stem}.dropped.jsonl")


def estimate(missing: Sequence[Request], wanted: int, arguments: argparse.Namespace) -> str:
    """What is about to be asked, and about what it will cost if every answer is as long as it may be."""
    text = sum(len(message["content"].split()) for request in missing for message in request.messages)
    tally = Tally(
        prompt_tokens=math.ceil(text * TOKENS_A_WORD), completion_tokens=len(missing) * arguments.max_tokens
    )
    return (
        f"{len(missing):,} of {wanted:,} rooms to ask {arguments.model} for: about {tally.prompt_tokens:,} "
        f"tokens of prompts and at most {tally.completion_tokens:,} of answers, "
        f"{tally.usd(arguments)}."
    )


def summary(tally: Tally, arguments: argparse.Namespace) -> str:
    """What came of it."""
    dropped = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.most_common()) or "none"
    retries = ", ".join(f"{count} {reason}" for reason, count in tally.retries.most_common()) or "none"
    return (
        f"{tally.asked:,} times asked in this run, {tally.kept:,} answers kept in {arguments.output}; "
        f"dropped: {dropped}; asked again: {retries}. {tally.prompt_tokens:,} tokens of prompts and "
        f"{tally.completion_tokens:,} of answers, {tally.usd(arguments)}."
    )


def key_of(arguments: argparse.Namespace) -> str | None:
    """The key in the environment, if there is one."""
    variable = arguments.key_variable or ("OPENAI_API_KEY" if arguments.url else "HF_TOKEN")
    return os.environ.get(variable)


async def ask_all(
    missing: Sequence[Request],
    tried: Mapping[str, int],
    seen: Seen,
    arguments: argparse.Namespace,
    tally: Tally,
) -> None:
    """Ask for all, `concurrency` at a time, and write each answer down as it comes.

    `tried` says of requests that were answered before, by id, at how many attempts.

    Raises:
        EndpointFailed: if it refuses, or too many requests in a row get no answer; what came before is kept.
    """
    # A word that is no key, or the Hub's saved token would be sent to whatever address was given.
    key = key_of(arguments) or ("no-key" if arguments.url else None)
    where = {"base_url": arguments.url} if arguments.url else {"provider": arguments.provider}
    client = AsyncInferenceClient(timeout=arguments.timeout_seconds, token=key, **where)  # type: ignore[arg-type]
    waiting = iter(missing)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(arguments.output, "a", encoding="utf-8") as kept,
        open(rejected_file(arguments.output), "a", encoding="utf-8") as dropped,
    ):

        async def work() -> None:
            for request in waiting:
                try:
                    answer = await ask(client, request, tried.get(request.id, 0), arguments, tally)
                except NoAnswer as error:
                    tally.failed += 1
                    tally.failed_in_a_row += 1
                    if tally.failed_in_a_row >= FAILURES_THAT_END_A_RUN:
                        raise EndpointFailed(
                            f"{tally.failed_in_a_row} requests in a row failed: {error}"
                        ) from error
                    continue
                tally.failed_in_a_row = 0
                title, description = split_answer(answer.text)
                reason = what_is_wrong(description, request.fields, title)
                if not reason and seen.has(description):
                    reason = "said before"
                if reason:
                    tally.dropped[reason] += 1
                    row = {
                        "id": request.id,
                        "reason": reason,
                        "answer": answer.text,
                        "attempt": answer.attempt,
                    }
                else:
                    tally.kept += 1
                    seen.add(description)
                    row = as_row(request, title, description, answer.seed, arguments)
                file = dropped if reason else kept
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())

        workers = [asyncio.ensure_future(work()) for _ in range(arguments.concurrency)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            await client.close()


async def ask(
    client: AsyncInferenceClient, request: Request, tried: int, arguments: argparse.Namespace, tally: Tally
) -> Answer:
    """One answer, after as many attempts as it takes and `attempts` allows; `tried` were there before.

    Each attempt sends a seed of its own, a function of the request and the attempt's number.

    Raises:
        EndpointFailed: if the endpoint refuses in a way that another try will not change.
        NoAnswer: if no try succeeded.
    """
    pause, reason, said = arguments.pause_seconds, "", ""
    for attempt in range(tried, tried + arguments.attempts):
        if attempt > tried:
            # Not all at once after a failure that hit all at once.
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))
            pause = min(LONGEST_PAUSE_SECONDS, pause * 2)
        tally.asked += 1
        seed = random.Random(f"{request.id} {attempt}").getrandbits(31)
        try:
            output = await client.chat_completion(
                request.messages,  # type: ignore[arg-type]
                model=arguments.model,
                max_tokens=arguments.max_tokens,
                temperature=arguments.temperature,
                top_p=arguments.top_p,
                seed=seed,
            )
            if usage := output.usage:
                tally.prompt_tokens += usage.prompt_tokens or 0
                tally.completion_tokens += usage.completion_tokens or 0
            # Half a surrogate pair, which JSON can spell and UTF-8 cannot, becomes a question mark.
            content = (output.choices[0].message.content or "").encode(errors="replace").decode()
            if text := content.strip():
                return Answer(text, attempt, seed)
            reason, said = "empty answer", ""
        except TimeoutError:
            reason, said = f"no answer within {arguments.timeout_seconds:g} s", ""
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            reason, said = f"status {status}", what_was_said(error, key_of(arguments))
            if status not in RETRIED_STATUS:
                raise EndpointFailed(f"the endpoint refused with {reason}{said}") from error
            pause = max(pause, retry_after(error.response))
        except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
            reason, said = "malformed answer", ""
        except (ValueError, OfflineModeIsEnabled) as error:  # of the client: provider, model or key
            raise EndpointFailed(f"nothing can be asked: {error}") from error
        except Exception as error:  # httpx's or httpx2's, whichever huggingface_hub brought
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise
            name = type(error).__name__  # of a timeout too, in older releases
            slow = f"no answer within {arguments.timeout_seconds:g} s"
            reason, said = slow if name in ("ReadTimeout", "PoolTimeout") else f"no connection ({name})", ""
        tally.retries[reason] += 1
    raise NoAnswer(f"no usable answer in {arguments.attempts} attempts, the last: {reason}{said}")


def what_was_said(error: HfHubHTTPError, key: str | None) -> str:
    """ ": " and the endpoint's own words about a refusal, without the key, or nothing if it has none."""
    said = " ".join((error.server_message or getattr(error.response, "text", "") or "").split())
    said = said.replace(key, "…") if key else said
    return f": {said[:LONGEST_REFUSAL]}" if said else ""


def retry_after(response: Any) -> float:
    """Seconds that the endpoint asks to wait, at most LONGEST_PAUSE_SECONDS; 0 for a date or nothing."""
    try:
        return min(LONGEST_PAUSE_SECONDS, max(0.0, float(response.headers.get("Retry-After") or 0)))
    except ValueError:
        return 0.0


def as_row(
    request: Request, title: str, description: str, seed: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """A row for `finetune.py`, with where it comes from."""
    return {
        "id": request.id,
        **({"title": title} if title else {}),
        **request.fields,
        "description": description,
        "teacher": arguments.model,
        "license": arguments.license,
        "teacher_prompt": request.messages[-1]["content"],
        "sampling": {
            **{name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens")},
            "seed": seed,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
