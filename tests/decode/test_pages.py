"""The schedule of rows and pages: everyone is answered, and no page is lost or held by two."""

import collections

from hypothesis import given, settings
from hypothesis import strategies as st

from tulu_jax.decode import pages as pages_lib

PAGE = 4
requests = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4)), min_size=1, max_size=8
)


def needed(length, most, samples):
    return -(-(length - 1 + most) // PAGE) + (samples > 1)


@given(requests, st.integers(1, 3), st.integers(1, 4), st.integers(0, 6), st.integers(1, 7))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_row_ends_and_every_page_comes_back(asked, parts, slots, spare, steps):
    pages = max(needed(*one) for one in asked) + 1 + spare
    schedule = pages_lib.Schedule(
        [[1] * length for length, _, _ in asked],
        most=[most for _, most, _ in asked],
        samples=[samples for *_, samples in asked],
        parts=parts,
        slots=slots,
        pages=pages,
        page=PAGE,
    )
    ended, visits = [], 0
    while schedule.waiting or schedule.rows:
        visits += 1
        assert visits < 2000
        fills = True
        while fills:
            fills, copies = schedule.admit(16)
            for part in range(parts):
                places = [page for fill in fills if fill.part == part for page in fill.pages]
                places += [copy.place for copy in copies if copy.part == part]
                assert len(set(places)) == len(places) and 0 not in places
        schedule.grow(steps)
        assert schedule.live() <= schedule.held() <= (pages - 1) * PAGE * parts
        for part in range(parts):
            rows = schedule.of_part(part)
            assert len(rows) <= slots
            written = collections.Counter(
                page for row in rows for page in row.pages[row.position // PAGE :]
            )
            assert all(count == 1 for count in written.values())
            assert not set(written) & set(schedule.pages.free[part])
        for row in list(schedule.rows):
            count = min(steps, row.most - len(row.ids))
            assert len(row.pages) * PAGE >= row.position + count
            row.ids += [0] * count
            row.position += count
            if len(row.ids) == row.most:
                schedule.end(row)
                ended.append((row.prompt, row.sample))
    assert sorted(ended) == [(i, s) for i, one in enumerate(asked) for s in range(one[2])]
    assert not schedule.prefixes
    assert all(len(free) == pages - 1 for free in schedule.pages.free)


stays = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 9)), min_size=8, max_size=8)


@given(requests, stays, st.integers(1, 2), st.integers(1, 4), st.integers(0, 6))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_requests_come_and_go_while_others_run(asked, times, parts, slots, spare):
    """Each comes at a visit, and is given up some visits later if it has not ended."""
    pages = max(needed(*one) for one in asked) + 1 + spare
    schedule = pages_lib.Schedule(
        [], most=[], samples=[], parts=parts, slots=slots, pages=pages, page=PAGE
    )
    ended = collections.Counter()
    for visit in range(2000):
        for number, ((length, most, samples), (come, stay)) in enumerate(
            zip(asked, times, strict=False)
        ):
            if visit == come:
                schedule.add(number, [1] * length, most=most, samples=samples)
            elif visit == come + stay + 1 and number in schedule.prompts:
                schedule.drop(number)
                assert all(row.prompt != number for row in schedule.rows)
        fills = True
        while fills:
            fills, _ = schedule.admit(16)
        assert schedule.rows or not schedule.waiting
        schedule.grow(3)
        for row in list(schedule.rows):
            count = min(3, row.most - len(row.ids))
            assert len(row.pages) * PAGE >= row.position + count
            row.ids += [0] * count
            row.position += count
            if len(row.ids) == row.most:
                schedule.end(row)
                ended[row.prompt] += 1
                if ended[row.prompt] == asked[row.prompt][2]:
                    schedule.drop(row.prompt)
        if visit > 6 and not schedule.prompts:
            break
    assert not (schedule.prompts or schedule.rows or schedule.waiting or schedule.prefixes)
    assert all(len(free) == pages - 1 for free in schedule.pages.free)
