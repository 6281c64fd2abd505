"""Generated domains: right answers (by independent solvers), fixed by the seed, held out as they say."""

from __future__ import annotations

import re
from collections import Counter
from itertools import permutations

import pytest

from moe_interp.errors import DataError
from moe_interp.testbed.config import TestbedConfig
from moe_interp.testbed.domains.arithmetic import Problem, arithmetic, final_answer, verify_solution
from moe_interp.testbed.domains.domain import Domain, split_of
from moe_interp.testbed.domains.facts import facts, is_asked, make_world
from moe_interp.testbed.domains.lookups import lookups
from moe_interp.testbed.domains.puzzles import puzzles
from moe_interp.testbed.domains.registry import load_domains
from moe_interp.testbed.domains.text import dataset_domain, python_standard_library, read_documents, text_domain

SMALL = {"n_train": 300, "n_validation": 40, "n_items": 60}
GENERATORS = {"arithmetic": arithmetic, "facts": facts, "puzzles": puzzles, "lookups": lookups}


@pytest.fixture(scope="module")
def worlds() -> dict[str, Domain]:
    return {name: make(**SMALL) for name, make in GENERATORS.items()}


@pytest.mark.parametrize("name", GENERATORS)
def test_the_seed_fixes_everything_and_splits_are_distinct(worlds, name):
    domain = worlds[name]
    assert GENERATORS[name](**SMALL) == domain
    assert GENERATORS[name](**SMALL, seed=1).train != domain.train
    assert len(set(domain.train)) == 300
    assert len(set(domain.validation)) == 40
    assert len(domain.items) == 60
    texts = [*domain.train, *domain.validation, *(i.prompt + i.answer for i in domain.items)]
    assert len(set(texts)) == 400


def chain(text: str) -> tuple[tuple[str, str], ...]:
    """The numbers and operations of a document's solution."""
    rows = re.findall(r"(\d+)([-+*])(\d+)=", text)
    return ((rows[0][0], ""), *((op, b) for _, op, b in rows))


def test_arithmetic_solutions_are_right_by_evaluating_the_chain(worlds):
    for document in worlds["arithmetic"].train:
        (start, _), *steps = chain(document)
        value = "(" * len(steps) + start + "".join(f"{op}{b})" for op, b in steps)
        assert final_answer(document) == str(eval(value))
        assert re.findall(r"\d+", document.split("\n")[0]) == [start, *(b for _, b in steps)]
        assert len(steps) <= 5
        assert all(0 <= int(n) <= 9999 for n in re.findall(r"=(\d+)", document))


def test_arithmetic_holds_out_computations_and_grades_items_evenly(worlds):
    domain = worlds["arithmetic"]
    trained = {chain(d) for d in domain.train}
    assert not trained & {chain(d) for d in domain.validation}
    assert not trained & {chain(item.fields["solution"]) for item in domain.items}
    grades = Counter((item.fields["steps"], item.fields["size"]) for item in domain.items)
    assert len(grades) == 15
    assert set(grades.values()) == {4}
    for item in domain.items:
        assert len(chain(item.fields["solution"])) - 1 == item.fields["steps"]
        assert item.fields["solution"].startswith(item.prompt[len(item.fields["question"]) :] + item.answer)
        assert item.answer == item.fields["final_answer"] == final_answer(item.fields["solution"])


def test_verify_solution_accepts_the_solution_and_no_other():
    problem = Problem(7, (("*", 6), ("-", 40)), "small")
    assert problem.solution() == "7*6=42\n42-40=2\nAnswer: 2"
    assert verify_solution(problem, problem.solution())
    for wrong in (
        "7*6=43\n43-40=3\nAnswer: 3",
        "7*6=42\n42-40=2\nAnswer: 3",
        "7*6=41\n42-40=2\nAnswer: 2",
        "6*7=42\n42-40=2\nAnswer: 2",
        "7*6=42\nAnswer: 2",
        "Answer: 2",
        "",
    ):
        assert not verify_solution(problem, wrong)
    assert final_answer("no number") is None


def test_facts_are_consistent_and_held_out_ones_are_never_asked(worlds):
    world, domain = make_world(), worlds["facts"]
    asked = Counter(q for d in domain.train for q in re.findall(r".+\?\nAnswer: .+", d))
    for item in domain.items:
        person = re.search("|".join(world), item.prompt)[0]
        relation = item.fields["relation"]
        assert item.answer == " " + world[person][relation]
        assert item.fields["asked_in_training"] == is_asked(person, relation)
        assert item.fields["asked_in_training"] or not asked[item.prompt + item.answer]
    assert len({p for p in world if any(p in d for d in domain.train)}) == len(world)


def test_every_order_puzzle_has_one_answer_found_by_trying_all_orders(worlds):
    more = ("taller", "older", "faster")
    for item in (i for i in worlds["puzzles"].items if i.fields["kind"] == "order"):
        pairs = re.findall(r"(\w+) is (\w+) than (\w+)", item.prompt)
        above = [(a, b) if word in more else (b, a) for a, word, b in pairs]
        people = sorted({p for pair in above for p in pair})
        orders = [o for o in permutations(people) if all(o.index(a) < o.index(b) for a, b in above)]
        most = re.search(r"the (tallest|oldest|fastest)", item.prompt) is not None
        assert [o[0 if most else -1] for o in orders] == [item.answer.strip()]
        assert len(people) == item.fields["n_people"]


def test_syllogisms_follow_from_their_links(worlds):
    for item in (i for i in worlds["puzzles"].items if i.fields["kind"] == "syllogism"):
        includes = set(re.findall(r"All (\w+) are (\w+)\.", item.prompt))
        excludes = set(re.findall(r"No (\w+) are (\w+)\.", item.prompt))
        start, goal = re.search(r"Are all (\w+) also (\w+)\?", item.prompt).groups()
        reached = {start}
        for _ in range(4):
            reached |= {b for a, b in includes if a in reached}
        denied = any(a in reached and b == goal for a, b in excludes)
        assert item.answer.strip() == ("yes" if goal in reached else "no" if denied else "unknown")


def test_lookups_read_the_table_and_convert_units(worlds):
    factors = {"hours": 60, "minutes": 60, "weeks": 7, "days": 24, "metres": 100}
    factors |= {"dozens": 12, "kilos": 1000, "feet": 12}
    kinds = Counter()
    for item in worlds["lookups"].items:
        kinds[item.fields["kind"]] += 1
        if item.fields["kind"] == "unit":
            n, unit = re.search(r"are (\d+) (\w+)\?", item.prompt).groups()
            expected = int(n) * factors[unit]
        else:
            head, *rows, question, _ = item.prompt.split("\n")
            row, column = re.search(r"What is (\w+) (\w+)\?", question).groups()
            cells = {r.split()[0]: dict(zip(head.split()[1:], r.split()[1:])) for r in rows}
            expected = int(cells[row][column])
        assert int(item.answer) == expected
    assert set(kinds) == {"unit", "table"}


def test_text_is_split_by_document_and_copies_are_dropped():
    documents = {f"file{i}": "\n".join(f"line {i} {j} of some length" for j in range(20)) for i in range(200)}
    documents["copy"] = documents["file0"]
    domain = text_domain("t", documents, validation=0.2, items=0.2, n_items=50)
    held_out = {text for key, text in documents.items() if split_of(key, 0.2, 0.2) == "items"}
    assert len(domain.train) + len(domain.validation) + len(held_out) in (200, 201)
    for item in domain.items:
        assert any(item.prompt + item.answer in text for text in held_out)
    with pytest.raises(DataError, match="no validation documents"):
        text_domain("t", {"only": "text"}, validation=0.0, items=0.0)


def test_the_standard_library_is_code_without_its_tests():
    domain = python_standard_library(n_items=20)
    assert len(domain.train) > 200
    assert len(domain.items) == 20
    assert any("class TextWrapper" in d or "def namedtuple" in d for d in (*domain.train, *domain.validation))
    assert not any("class TestFailedException" in d for d in domain.train)


def test_reading_documents_of_a_file_and_a_folder(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"domain": "x", "text": "one"}\n{"domain": "y", "text": "two"}\n')
    assert list(read_documents(tmp_path / "a.jsonl").values()) == ["one", "two"]
    assert list(read_documents(tmp_path / "a.jsonl", "y").values()) == ["two"]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.txt").write_text("three")
    assert read_documents(tmp_path / "folder") == {"b.txt": "three"}
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: Expecting value"):
        read_documents(tmp_path / "bad.jsonl")
    for line in ("[1]", "3", '{"text": 3}', '{"path": "a"}'):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(DataError, match=r"bad\.jsonl, line 1 is .* Expected: a JSON object with a string 'text'"):
            read_documents(tmp_path / "bad.jsonl")
    with pytest.raises(DataError, match="holds no documents"):
        read_documents(tmp_path / "nowhere")


def test_real_text_folders_become_domains(shared_data):
    domain = text_domain("german", read_documents(shared_data / "text" / "german_law.jsonl"))
    assert len(domain.train) > len(domain.validation) > 0
    assert domain.items


def test_datasets_are_optional(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'moe-interp\[data\]'"):
        dataset_domain("d", "some/dataset")


def test_a_dataset_is_loaded_by_name(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "essays"
    folder.mkdir()
    texts = [f"text {i}" for i in range(400)]
    datasets.Dataset.from_dict({"body": texts, "number": range(400)}).to_parquet(str(folder / "train.parquet"))
    domain = dataset_domain("d", str(folder), column="body", n_documents=300)
    assert set(domain.train) | set(domain.validation) < set(texts[:300])
    # the same documents by a configuration's name for it
    (whole,) = load_domains(TestbedConfig(domains=(f"essays=hub:{folder}:body",)))
    assert whole.name == "essays"
    assert set(domain.train) < set(whole.train) < set(texts)
    with pytest.raises(DataError, match=r"row 0, has columns \['body', 'number'\]"):
        dataset_domain("d", str(folder))
    with pytest.raises(DataError, match=r"dataset '.*nowhere' cannot be read"):
        dataset_domain("d", str(tmp_path / "nowhere"))
