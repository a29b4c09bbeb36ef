"""What becomes of the others when a rank ends."""


def test_a_rank_that_waits_for_one_that_has_ended_says_so(short_crew):
    first, second = short_crew.ask("lose")
    assert "another rank has ended" in first
    assert second is None
