"""Who is decoded next, and in which pages of the cache: the host's side of a decoder, no arrays.

A row is one continuation that is being decoded. The positions of its prompt but the last token are
computed once for all its samples, into pages that these share; the last of them, if it is not full,
is copied for each sample but the last. Everything is counted by part of the mesh (`data` x `fsdp`):
rows and their pages lie in one part.

A full page of a prompt is known by its ids and those before it, also when nobody holds it any more,
until it is taken for others. A prompt that begins with known pages shares them, and only the rest
of it is computed.

Pages are taken as a row grows. Where none is free, the youngest row of the part gives its own back
and begins anew later: its tokens depend on itself alone, so they will be the same.
"""

import collections
import dataclasses


@dataclasses.dataclass(kw_only=True)
class Row:
    """One continuation of `prompt`: what is in the cache, `position` tokens in `pages`; the `token`
    that is put in next; and what came out, at most `most` ids."""

    prompt: int
    sample: int
    part: int
    pages: list[int]
    position: int
    token: int
    most: int
    ids: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(kw_only=True)
class Prefix:
    """The computed prompt of samples that have not begun: `full` pages and perhaps one more."""

    part: int
    pages: list[int]
    full: int


@dataclasses.dataclass(kw_only=True)
class Fill:
    """A prompt without its last token: what comes behind the pages `known` is to be computed at
    `start` of its part's row, page by page into `pages`."""

    prompt: int
    part: int
    start: int
    known: list[int]
    pages: list[int]


@dataclasses.dataclass(kw_only=True)
class Copy:
    part: int
    taken: int
    place: int


class Pages:
    """The free pages of each part, and how many have each of the others. Page 0 is nobody's.

    Of `free` the last is taken first: what nobody knows, then what has been free for longest, the
    end of a prompt before its beginning. A page is known by its ids and by the number of the page
    before it, which is new each time that one is computed.
    """

    def __init__(self, parts: int, pages: int):
        self.free = [collections.deque(range(pages - 1, 0, -1)) for _ in range(parts)]
        self.holders = [collections.Counter() for _ in range(parts)]
        self.known: list[dict[tuple, int]] = [{} for _ in range(parts)]
        self.names: list[dict[int, tuple]] = [{} for _ in range(parts)]
        self.numbers: list[dict[int, int]] = [{} for _ in range(parts)]
        self.count = 0

    def take(self, part: int, count: int) -> list[int]:
        taken = [self.free[part].pop() for _ in range(count)]
        for page in taken:
            if page in self.names[part]:
                del self.known[part][self.names[part].pop(page)], self.numbers[part][page]
        self.holders[part].update(taken)
        return taken

    def share(self, part: int, pages: list[int]) -> None:
        for page in pages:
            if page not in self.holders[part]:
                self.free[part].remove(page)
        self.holders[part].update(pages)

    def release(self, part: int, pages: list[int]) -> None:
        for page in reversed(pages):
            self.holders[part][page] -= 1
            if not self.holders[part][page]:
                del self.holders[part][page]
                if page in self.names[part]:
                    self.free[part].appendleft(page)
                else:
                    self.free[part].append(page)

    def find(self, part: int, cut: list[tuple[int, ...]]) -> list[int]:
        """The known pages of the ids `cut`, a tuple for each page, from the first on."""
        found, before = [], 0
        for ids in cut:
            page = self.known[part].get((before, ids))
            if page is None:
                break
            found.append(page)
            before = self.numbers[part][page]
        return found

    def learn(self, part: int, cut: list[tuple[int, ...]], pages: list[int]) -> None:
        """Knows `pages` by the ids `cut`, as far as others are not known by them."""
        before = 0
        for ids, page in zip(cut, pages, strict=False):
            if page not in self.names[part]:
                self.count += 1
                self.names[part][page], self.numbers[part][page] = (before, ids), self.count
                self.known[part][before, ids] = page
            before = self.numbers[part][page]


class Schedule:
    """The rows of one call of a decoder, from the first that waits to the last that ends.

    `prompts` are ids, `most` and `samples` the new tokens and the continuations of each; more may
    come (`add`), and go (`drop`), at any time between programs.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        *,
        most: list[int],
        samples: list[int],
        parts: int,
        slots: int,
        pages: int,
        page: int,
    ):
        self.page, self.parts, self.slots = page, parts, slots
        self.pages = Pages(parts, pages)
        self.prompts: dict[int, list[int]] = {}
        self.most: dict[int, int] = {}
        self.not_begun: dict[int, int] = {}
        self.waiting: collections.deque[tuple[int, int]] = collections.deque()
        self.prefixes: dict[int, Prefix] = {}
        self.rows: list[Row] = []  # in the order in which they began
        self.shared = 0  # positions of prompts that were there already
        self.to_fill: list[set[int]] = []  # pages of each part that this call of `admit` gives
        for number, (ids, new, count) in enumerate(zip(prompts, most, samples, strict=True)):
            self.add(number, ids, most=new, samples=count)

    def add(self, number: int, prompt: list[int], *, most: int, samples: int) -> None:
        """One more prompt, behind those that wait."""
        self.prompts[number], self.most[number] = prompt, most
        self.not_begun[number] = samples
        self.waiting.extend((number, sample) for sample in range(samples))

    def drop(self, number: int) -> None:
        """Forgets a prompt: what waits of it, its rows and its pages."""
        for row in [row for row in self.rows if row.prompt == number]:
            self.end(row)
        self.waiting = collections.deque(place for place in self.waiting if place[0] != number)
        self._forget([number] if number in self.prefixes else [])
        del self.prompts[number], self.most[number], self.not_begun[number]

    def of_part(self, part: int) -> list[Row]:
        return [row for row in self.rows if row.part == part]

    def admit(self, length: int) -> tuple[list[Fill], list[Copy]]:
        """Begins rows for as long as there are slots and pages, in order. Gives the prompts to
        compute, of at most `length` positions in a part unless one alone is longer, and then the
        pages to copy. A prompt that shares what is to be filled waits for the next call. What it
        gives nothing to fill for cannot begin now."""
        fills: list[Fill] = []
        copies: list[Copy] = []
        ends = [0] * self.parts
        self.to_fill = [set() for _ in range(self.parts)]
        while self.waiting:
            prompt, sample = self.waiting[0]
            if prompt not in self.prefixes and not self._prefix(prompt, fills, ends, length):
                if self.rows or fills or not self._forget_others(prompt):
                    break
                continue
            if not self._begin(prompt, sample, copies):
                if self.rows or fills or not self._forget_others(prompt):
                    break
                continue
            self.waiting.popleft()
        return fills, copies

    def _prefix(self, prompt: int, fills: list[Fill], ends: list[int], length: int) -> bool:
        """Whether there was room for the prompt, which then is among `fills`."""
        positions = len(self.prompts[prompt]) - 1
        count = -(-positions // self.page)
        part = max(
            range(self.parts),
            key=lambda part: (-len(self.of_part(part)), len(self.pages.free[part]), -part),
        )
        others, full = len(self.of_part(part)), positions // self.page
        ahead = others + 1 if others else 0  # pages that rows will soon want
        ids = self.prompts[prompt]
        cut = [tuple(ids[n * self.page : (n + 1) * self.page]) for n in range(full)]
        known = self.pages.find(part, cut)
        count -= len(known)
        free = len(self.pages.free[part]) - sum(p not in self.pages.holders[part] for p in known)
        if others >= self.slots or free < count + ahead or not self.to_fill[part].isdisjoint(known):
            return False
        if ends[part] and count and ends[part] + count * self.page > length:
            return False
        self.pages.share(part, known)
        self.shared += len(known) * self.page
        new = self.pages.take(part, count)
        self.pages.learn(part, cut, [*known, *new])
        self.to_fill[part].update(new)
        self.prefixes[prompt] = Prefix(part=part, pages=[*known, *new], full=full)
        if count:
            fill = Fill(prompt=prompt, part=part, start=ends[part], known=known, pages=new)
            fills.append(fill)
            ends[part] += count * self.page
        return True

    def _begin(self, prompt: int, sample: int, copies: list[Copy]) -> bool:
        prefix, ids = self.prefixes[prompt], self.prompts[prompt]
        part, shared, rest = prefix.part, prefix.pages[: prefix.full], prefix.pages[prefix.full :]
        if len(self.of_part(part)) >= self.slots:
            return False
        if self.not_begun[prompt] == 1:
            pages = prefix.pages
            del self.prefixes[prompt]
        else:
            if len(self.pages.free[part]) < len(rest):
                return False
            own = self.pages.take(part, len(rest))
            self.pages.share(part, shared)
            pages = [*shared, *own]
            copies += [
                Copy(part=part, taken=taken, place=place)
                for taken, place in zip(rest, own, strict=True)
            ]
        self.not_begun[prompt] -= 1
        row = Row(
            prompt=prompt,
            sample=sample,
            part=part,
            pages=list(pages),
            position=len(ids) - 1,
            token=ids[-1],
            most=self.most[prompt],
        )
        self.rows.append(row)
        return True

    def _forget(self, prompts: list[int]) -> bool:
        """Gives back the pages of computed prompts whose samples have not all begun, which will be
        computed again; whether there were any."""
        for prompt in prompts:
            prefix = self.prefixes.pop(prompt)
            self.pages.release(prefix.part, prefix.pages)
        return bool(prompts)

    def _forget_others(self, prompt: int) -> bool:
        return self._forget([other for other in self.prefixes if other != prompt])

    def grow(self, steps: int) -> None:
        """Pages for `steps` more tokens of every row, the oldest first."""
        for row in list(self.rows):
            ahead = min(steps, row.most - len(row.ids))
            while row in self.rows and len(row.pages) * self.page < row.position + ahead:
                if self.pages.free[row.part]:
                    row.pages += self.pages.take(row.part, 1)
                elif not self._forget([i for i, p in self.prefixes.items() if p.part == row.part]):
                    self._put_back(self.of_part(row.part)[-1])

    def _put_back(self, row: Row) -> None:
        self.end(row)
        self.waiting.appendleft((row.prompt, row.sample))
        self.not_begun[row.prompt] += 1

    def end(self, row: Row) -> None:
        """The row's slot and pages are free."""
        self.rows.remove(row)
        self.pages.release(row.part, row.pages)

    def held(self) -> int:
        """Positions of the pages that somebody holds, a shared one counted once."""
        return self.page * sum(len(holders) for holders in self.pages.holders)

    def live(self) -> int:
        """Positions in them that are computed, as `held` counts them."""
        ends = [(row.part, row.pages, row.position) for row in self.rows]
        ends += [
            (prefix.part, prefix.pages, len(self.prompts[prompt]) - 1)
            for prompt, prefix in self.prefixes.items()
        ]
        full = {(part, page) for part, pages, end in ends for page in pages[: end // self.page]}
        return self.page * len(full) + sum(end % self.page for _, _, end in ends)
