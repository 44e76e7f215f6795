"""TyDi QA, gold passage (Clark et al. 2020): questions in nine languages, one example each.

Source: TÜLU 2 (arXiv 2311.10702), its evaluation code of November 2023.
"""

import dataclasses
import random
from collections.abc import Iterable, Sequence
from typing import ClassVar

from etils import epath

from tulu_jax import validation
from tulu_jax.data import chat as chat_lib
from tulu_jax.decode.sampling import Sampling
from tulu_jax.evals import benchmark, data_files, scoring, text_match

PAPER_ITEMS = 100  # of each language
SEED = 42
MOST_TOKENS = 512  # of a passage
TEMPLATES = {  # instruction, and what stands before passage, question and answer
    "arabic": (
        "أجب على السؤال التالي بناءً على المعلومات في المقطع المعطى.",
        "المقطع:",
        "السؤال:",
        "الإجابة:",
    ),
    "bengali": (
        "প্রদত্ত অধ্যায়ের তথ্যের উপর ভিত্তি করে নিম্নলিখিত প্রশ্নের উত্তর দিন।",
        "অধ্যায়:",
        "প্রশ্ন:",
        "উত্তর:",
    ),
    "english": (
        "Answer the following question based on the information in the given passage.",
        "Passage:",
        "Question:",
        "Answer:",
    ),
    "finnish": (
        "Vastaa seuraavaan kysymykseen annetun kappaleen tiedon perusteella.",
        "Kappale:",
        "Kysymys:",
        "Vastaus:",
    ),
    "indonesian": (
        "Jawab pertanyaan berikut berdasarkan informasi di bagian yang diberikan.",
        "Bagian:",
        "Pertanyaan:",
        "Jawaban:",
    ),
    "korean": (
        "주어진 문단의 정보에 기반하여 다음 질문에 답하십시오.",
        "문단:",
        "질문:",
        "답변:",
    ),
    "russian": (
        "Ответьте на следующий вопрос на основе информации в данном отрывке.",
        "Отрывок:",
        "Вопрос:",
        "Ответ:",
    ),
    "swahili": (
        "Jibu swali lifuatalo kulingana na habari kwenye kifungu kilichotolewa.",
        "Kifungu:",
        "Swali:",
        "Jibu:",
    ),
    "telugu": (
        "ఇచ్చిన పేరాలోని సమాచారం ఆధారంగా కింది ప్రశ్నకు సమాధానం ఇవ్వండి.",
        "పేరా:",
        "ప్రశ్న:",
        "సమాధానం:",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TyDiQA:
    """SQuAD's F1, averaged over languages. `bos_in_passages`: what is left of a passage of more
    than 512 tokens begins with BOS as a text, "<s>", which is one of the 512, as in the original;
    False cuts the passage alone."""

    name: ClassVar[str] = "tydiqa"
    judges: ClassVar[tuple[str, ...]] = ()

    subset: str = "paper"
    allow_altered: bool = False
    bos_in_passages: bool = True

    def __post_init__(self):
        validation.check(self, lambda: [scoring.subset_rule(self.subset)])

    def requests(
        self, data: epath.Path, tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> list[benchmark.Request]:
        """100 questions of each language, or all, and then the example of each, all from one
        generator; a language without training rows has no example (`allow_altered`)."""
        files = data_files.load(data, self.name, allow_altered=self.allow_altered).content
        asked = _by_language(row for path, rows in files.items() if "dev" in path for row in rows)
        shown = _by_language(row for path, rows in files.items() if "train" in path for row in rows)
        if not asked:
            raise validation.UsageError(
                f"found no questions in {epath.Path(data) / 'tydiqa'}; expected those of the "
                "development split; give the folder that has them"
            )
        generator = random.Random(SEED)
        if self.subset == "paper":
            asked = {
                language: generator.sample(rows, PAPER_ITEMS) if len(rows) > PAPER_ITEMS else rows
                for language, rows in asked.items()
            }
        shots = {
            language: generator.sample(shown[language], 1)
            for language in asked
            if language in shown
        }
        return [
            self._request(row, shots.get(language, []), tokenizer, is_chat=is_chat)
            for language, rows in asked.items()
            for row in rows
        ]

    def _request(
        self, row: dict, shots: Sequence[dict], tokenizer: chat_lib.ChatTokenizer, *, is_chat: bool
    ) -> benchmark.Request:
        language = _language(row)
        instruction, passage, question, answer = TEMPLATES[language]
        parts = [instruction]
        for shown in (*shots, row):
            context = self._cut(shown["context"], tokenizer)
            part = f"{passage} {context}\n{question} {shown['question']}\n"
            parts.append(part if shown is row else f"{part}{answer} {shown['answers'][0]}")
        content = "\n\n".join(parts)  # ends with a newline, also in a chat
        return benchmark.Request(
            id=row["id"],
            group=language,
            prompt=[{"role": "user", "content": content}] if is_chat else content + answer,
            prefix=answer if is_chat else "",
            sampling=Sampling(max_new_tokens=50, stop=() if is_chat else ("\n",)),
            truth={"answers": row["answers"]},
        )

    def _cut(self, context: str, tokenizer: chat_lib.ChatTokenizer) -> str:
        ids = tokenizer.encode(context)
        if self.bos_in_passages:
            ids = [tokenizer.bos_id, *ids]
        if len(ids) <= MOST_TOKENS:
            return context
        return tokenizer.decode(ids[:MOST_TOKENS], skip_special=False)

    def questions(
        self, requests: Sequence[benchmark.Request], answers: Sequence[benchmark.Answer]
    ) -> list[benchmark.Question]:
        return []

    def score(
        self,
        requests: Sequence[benchmark.Request],
        answers: Sequence[benchmark.Answer],
        verdicts: benchmark.Verdicts | None,
    ) -> list[benchmark.Metric]:
        """F1, as the paper has it, and exact match."""
        f1, exact = {}, {}
        for request, answer in scoring.pairs(requests, answers):
            said, right = answer.texts[0].strip(), request.truth["answers"]
            f1[request.id] = text_match.squad_f1(said, right)
            exact[request.id] = text_match.squad_exact(said, right)
        return [
            scoring.mean_over_groups("f1", f1, requests),
            scoring.mean_over_groups("exact match", exact, requests),
        ]


def _language(row: dict) -> str:
    """That of a question, by its id. Raises `UsageError` for one that has no template."""
    language = row["id"].partition("-")[0]
    if language not in TEMPLATES:
        raise validation.UsageError(
            f"tydiqa: found the question {row['id']!r}; expected an id that begins with one of "
            f"{', '.join(TEMPLATES)} and '-'"
        )
    return language


def _by_language(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """The rows of each language, in order; the languages sorted."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(_language(row), []).append(row)
    return dict(sorted(found.items()))
