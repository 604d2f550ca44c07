"""docs/reliability.md is what its rows say."""

from pathlib import Path

from hub_tables import LOAD_FAULTS, PAGE, PUSH_FAULTS, page


def test_page_is_the_rendered_tables() -> None:
    from hub_attacks import ATTACKS, EVENTS, KILLS

    assert PAGE.read_text(encoding='utf-8') == page(), 'run: python tests/hub/support/hub_tables.py'
    from model_rows import MODELS

    for row in filter(lambda r: r.id, MODELS):
        file, _, test = row.id.partition('::')
        assert f'def {test}(' in (Path(__file__).parents[1] / file).read_text(encoding='utf-8'), row.id
    for rows in (PUSH_FAULTS, LOAD_FAULTS, ATTACKS, EVENTS, KILLS):
        assert len({r.id for r in rows}) == len(rows)
    assert len([r for r in ATTACKS if r.step == 'config.json']) >= 25
