"""The host's loop around the programs: requests in, what comes of them out."""

import jax
import numpy as np

from tulu_jax.decode import continuation, programs, results, same_bits, seats
from tulu_jax.decode import pages as pages_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.models import paged_attention

NO_ID = -1
FIELDS = ("tokens", "segment_ids", "positions", "branches")


def of_all(decoder, params, prompts, each, key) -> "Call":
    """The call of requests that are all there, with a cache as large as they need."""
    pages = decoder.capacity()
    if pages is None:
        slots = max(1, decoder.slots // decoder.parts)
        needs = sorted(
            decoder.pages_of(len(prompt), sampling)
            for prompt, sampling in zip(prompts, each, strict=True)
            for _ in range(sampling.samples)
        )
        pages = programs.rounded(sum(needs[-slots:]) + slots + 1)
    stops = max(1, *(len(sampling.stop_ids) for sampling in each))
    call = Call(decoder, params, pages=pages, stops=stops, key_impl=jax.random.key_impl(key))
    drawn = any(sampling.temperature for sampling in each)
    places = [(i, s) for i, sampling in enumerate(each) for s in range(sampling.samples)]
    words = words_of(key, places if drawn else [])
    for i, (prompt, sampling) in enumerate(zip(prompts, each, strict=True)):
        own = {(i, s): words[i, s] for s in range(sampling.samples)} if drawn else {}
        call.add(i, prompt, sampling, own)
    return call


def words_of(key, places: list[tuple[int, int]]) -> dict[tuple[int, int], np.ndarray]:
    """The words of the key of each of `places`, (prompt, sample)."""
    if not places:
        return {}
    size = programs.rounded(len(places))
    prompts, numbers = np.zeros((2, size), np.int32)
    prompts[: len(places)], numbers[: len(places)] = np.array(places).T
    words = np.asarray(programs.key_words(key, prompts, numbers))
    return dict(zip(places, words, strict=False))


def _known(segments: list[dict[tuple[int, ...], int]]) -> programs.Known | None:
    """The known pages of the segments of each part, 4, 16, 64 or so; None if there are none."""
    listed = [
        [(page, number) for pages, number in own.items() for page in pages] for own in segments
    ]
    most = max(map(len, listed))
    if not most:
        return None
    size = 4
    while size < most:
        size *= 4
    places = np.full((len(listed), size), paged_attention.NOBODYS, np.int32)
    numbers = np.zeros((len(listed), size), np.int32)
    for part, pairs in enumerate(listed):
        if pairs:
            places[part, : len(pairs)], numbers[part, : len(pairs)] = zip(*pairs, strict=True)
    return programs.Known(places=places, segment_ids=numbers)


class Call:
    """Requests that share slots and a cache: the schedule, the programs, and what came out.

    `pages` are those of each part, `stops` the most stop ids of a request. Requests are added
    (`add`) and dropped (`drop`) between programs, which `advance` runs.
    """

    def __init__(self, decoder, params, *, pages: int, stops: int, key_impl):
        self.decoder, self.params = decoder, params
        parts = decoder.parts
        self.schedule = pages_lib.Schedule(
            [], most=[], samples=[], parts=parts, slots=max(1, decoder.slots // parts),
            pages=pages, page=decoder.page,
        )  # fmt: skip
        self.stops, self.key_impl = stops, key_impl
        self.cache = programs.empty_cache(
            config=decoder.config, pages=pages * parts, page=decoder.page,
            dtype=decoder.execution.compute_dtype,
        )  # fmt: skip
        by_row = parts == 1 and programs.goes_by_row(decoder.config, params, decoder.attend)
        config, dtype = decoder.config, decoder.execution.compute_dtype
        self.fewest = same_bits.fewest_rows(config, params, dtype=dtype, slots=decoder.slots)
        self.seats = None
        if by_row:
            fewest = same_bits.fewest_seats(config, dtype=dtype, page=decoder.page)
            self.seats = seats.Seats(decoder.page, fewest)
        self.stepped = programs.with_head(params) if self.fewest else params
        self.each: dict[int, Sampling] = {}
        self.words: dict[tuple[int, int], np.ndarray] = {}
        self.sent: dict[tuple[int, int], tuple[int, int]] = {}  # ids and characters

    def add(self, number: int, prompt: list[int], sampling: Sampling, words: dict) -> None:
        """One more request. `words` are those of the keys of (prompt, sample), none for a greedy
        one."""
        self.each[number] = sampling
        self.words |= words
        self.schedule.add(
            number, prompt, most=self.decoder.fits(len(prompt), sampling), samples=sampling.samples
        )

    def drop(self, number: int) -> None:
        """Forgets a request, whose slots and pages are free."""
        self.schedule.drop(number)
        for sample in range(self.each.pop(number).samples):
            self.words.pop((number, sample), None)
            self.sent.pop((number, sample), None)

    @property
    def is_busy(self) -> bool:
        """Whether there is something to advance."""
        return bool(self.schedule.waiting or self.schedule.rows)

    def run(self, detokenize, stream, ended=None) -> list[results.Result]:
        """All continuations, in order; `ended` is given each as it ends."""
        found = []
        while self.is_busy:
            new = self.advance(detokenize, stream)
            for result in new if ended is not None else ():
                ended(result)
            found += new
        return sorted(found, key=lambda result: (result.prompt, result.sample))

    def advance(self, detokenize, stream) -> list[results.Result]:
        """Begins what has room, runs one program of steps, and gives what has ended."""
        schedule, decoder, found = self.schedule, self.decoder, []
        fills = True
        while fills:
            fills, copies = schedule.admit(decoder.row_length)
            self._fill(fills)
            self._copy(copies)
        decoder.usage.shared = schedule.shared
        assert schedule.rows, "no row fits in the cache, which `_check` rules out"
        schedule.grow(decoder.steps)
        before = {id(row): len(row.ids) for row in schedule.rows}
        self._burst()
        for row in list(schedule.rows):
            result = self._ended(row, len(row.ids) - before[id(row)], detokenize)
            if stream is not None:
                self._send(row, result, detokenize, stream)
            if result is not None:
                schedule.end(row)
                found.append(result)
                decoder.usage.useful += len(result.ids)
        return found

    def _fill(self, fills: list[pages_lib.Fill]) -> None:
        """Computes prompts into their pages. Those behind the same known pages are branches of one
        segment, which begins with these."""
        if not fills:
            return
        decoder, parts, page = self.decoder, self.schedule.parts, self.decoder.page
        length = decoder.bucket(max(fill.start + len(fill.pages) * page for fill in fills))
        rows = {name: np.zeros((parts, length), np.int32) for name in FIELDS}
        places = np.full((parts, length // page), paged_attention.NOBODYS, np.int32)
        segments: list[dict[tuple[int, ...], int]] = [{} for _ in range(parts)]
        for branch, fill in enumerate(fills, 1):
            begin = len(fill.known) * page
            ids = self.schedule.prompts[fill.prompt][begin:-1]
            here = (fill.part, slice(fill.start, fill.start + len(ids)))
            own = segments[fill.part]
            rows["tokens"][here], rows["branches"][here] = ids, branch
            rows["segment_ids"][here] = own.setdefault(tuple(fill.known), len(own) + 1)
            rows["positions"][here] = range(begin, begin + len(ids))
            first = fill.start // page
            places[fill.part, first : first + len(fill.pages)] = fill.pages
            decoder.usage.prompts += len(ids)
        decoder.usage.packed += rows["tokens"].size
        taken = np.broadcast_to(np.arange(length // page, dtype=np.int32), places.shape)
        self.cache = programs.fill(
            self.params,
            self.cache,
            rows,
            taken.reshape(-1),
            places.reshape(-1),
            _known(segments),
            config=decoder.config,
            execution=decoder.execution,
            page=page,
        )

    def _copy(self, copies: list[pages_lib.Copy]) -> None:
        if not copies:
            return
        lists = [[c for c in copies if c.part == part] for part in range(self.schedule.parts)]
        taken, places = np.zeros((2, len(lists), self.schedule.slots), np.int32)
        for part, listed in enumerate(lists):
            taken[part, : len(listed)] = [copy.taken for copy in listed]
            places[part, : len(listed)] = [copy.place for copy in listed]
        self.cache = programs.copy(self.cache, taken.reshape(-1), places.reshape(-1))

    def _burst(self) -> None:
        """Steps of all rows; their new ids and log-probabilities are added to them."""
        schedule, decoder = self.schedule, self.decoder
        by_part = [schedule.of_part(part) for part in range(schedule.parts)]
        most = max(map(len, by_part))
        size = min(same_bits.filled(most), max(schedule.slots, most))
        size = max(size, programs.FEWEST_ROWS)
        if self.seats is not None:
            placed = list(self.seats.place(self.cache, by_part[0], decoder.steps).items())
            size, pages, cached = len(self.seats.rows), 1, self.seats.arrays
        else:
            placed = [
                (p * size + n, row) for p, rows in enumerate(by_part) for n, row in enumerate(rows)
            ]
            pages, cached = -(-decoder.max_length // decoder.page), self.cache
        out, steps, cached = programs.run_steps(
            self.stepped,
            cached,
            self._arrays(placed, size * schedule.parts, pages),
            np.int32(self._least(len(placed), size)),
            config=decoder.config,
            execution=decoder.execution,
            steps=decoder.steps,
            attend=decoder.attend,
            key_impl=self.key_impl,
            multiplied=max(self.fewest, same_bits.filled(size)) if self.fewest else 1,
        )
        if self.seats is not None:
            self.seats.arrays = cached
        else:
            self.cache = cached
        steps, tokens, logps = int(steps), np.asarray(out["tokens"]), np.asarray(out["logps"])
        usage = decoder.usage
        usage.decoded += steps * size * schedule.parts
        for place, row in placed:
            count = steps
            stop_ids = self.each[row.prompt].stop_ids
            new = tokens[:count, place].tolist()
            ended = [n for n, token in enumerate(new, 1) if token in stop_ids]
            count = min([count, row.most - len(row.ids), *ended[:1]])
            row.ids += new[:count]
            row.logps += logps[:count, place].tolist()
            row.token, row.position = row.ids[-1], row.position + count
        usage.held += schedule.held()
        usage.live += schedule.live()

    def _least(self, busy: int, size: int) -> int:
        """With how many rows of `busy` a program of `size` ends: when a row makes room for one that
        waits, or else when what is left fits in a smaller program."""
        if self.schedule.waiting:
            return busy - 1
        fewest = programs.FEWEST_ROWS if self.seats is None else self.seats.fewest
        shrinks = self.schedule.parts == 1 and size > fewest
        return min(busy - 1, same_bits.filled(size) // 2) if shrinks else 0

    def _arrays(self, placed, size: int, pages: int) -> dict[str, np.ndarray]:
        """What a program needs to know of its `size` rows, of at most `pages` pages each."""
        words = next(iter(self.words.values())) if self.words else np.zeros(2, np.uint32)
        ints = ("token", "position", "left", "count", "min_new_tokens", "top_k")
        rows = {name: np.zeros(size, np.int32) for name in ints}
        rows |= {name: np.ones(size, np.float32) for name in ("temperature", "top_p")}
        rows["temperature"][:] = 0
        rows["keys"] = np.zeros((size, *words.shape), words.dtype)
        rows["stop_ids"] = np.full((size, self.stops), NO_ID, np.int32)
        rows["table"] = np.full((size, pages), paged_attention.NOBODYS, np.int32)
        for place, row in placed:
            sampling = self.each[row.prompt]
            rows["token"][place], rows["position"][place] = row.token, row.position
            rows["left"][place], rows["count"][place] = row.most - len(row.ids), len(row.ids)
            for name in ("min_new_tokens", "temperature", "top_p", "top_k"):
                rows[name][place] = getattr(sampling, name)
            if (row.prompt, row.sample) in self.words:
                rows["keys"][place] = self.words[row.prompt, row.sample]
            rows["stop_ids"][place, : len(sampling.stop_ids)] = sampling.stop_ids
            if self.seats is None:
                rows["table"][place, : len(row.pages)] = row.pages
        return rows

    def _ended(self, row: pages_lib.Row, fresh: int, detokenize) -> results.Result | None:
        """The result of a row that has ended, else None."""
        sampling = self.each[row.prompt]
        ids, logps, text, ended = row.ids, row.logps, None, None
        if ids[-1] in sampling.stop_ids:
            ended = "stop_id"
        elif len(ids) >= row.most:
            ended = "length"
        if detokenize is not None:
            found = None
            if sampling.stop:
                least = sampling.min_new_tokens
                found = continuation.stopped(ids, fresh, sampling.stop, least, detokenize)
            if found is not None:
                (count, text), ended = found, "stop"
                ids, logps = ids[:count], logps[:count]
            elif ended is not None:
                text = detokenize(ids[:-1] if ended == "stop_id" else ids)
        if ended is None:
            return None
        return results.Result(
            prompt=row.prompt, sample=row.sample, ids=ids, logps=logps, text=text, ended=ended
        )

    def _send(self, row: pages_lib.Row, result: results.Result | None, detokenize, stream) -> None:
        """Streams what of a row is new; one that began anew says nothing twice."""
        place = (row.prompt, row.sample)
        ids, text = row.ids, ""
        if result is not None:
            ids, text = result.ids, result.text or ""
        elif detokenize is not None:
            text = continuation.settled(detokenize(ids), self.each[row.prompt].stop)
        sent_ids, sent_text = self.sent.get(place, (0, 0))
        self.sent[place] = (max(sent_ids, len(ids)), max(sent_text, len(text)))
        ended = None if result is None else result.ended
        if ended or len(ids) > sent_ids:
            stream(results.Piece(
                prompt=row.prompt, sample=row.sample, ids=ids[sent_ids:],
                logps=row.logps[sent_ids : len(ids)], text=text[sent_text:], ended=ended,
            ))  # fmt: skip
