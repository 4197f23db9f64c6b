"""Who is told of graph captures and replays, on a class that stands in for `torch.cuda.CUDAGraph`."""

import contextlib
import gc
import threading

import pytest

from tolaria import capture


def make_graph_class():
    class Graph:
        """Four methods that note their calls; `capture_begin` and `capture_end` fail on demand."""

        def __init__(self):
            self.calls = []
            self.fails = ""

        def _do(self, name):
            if self.fails == name:
                raise RuntimeError(name)
            self.calls.append(name)
            return name

        def capture_begin(self, pool=None, *, capture_error_mode="global"):
            return self._do(f"begin {pool} {capture_error_mode}" if not self.fails else "begin")

        def capture_end(self):
            return self._do("end")

        def replay(self):
            return self._do("replay")

        def reset(self):
            return self._do("reset")

    return Graph


class Ear:
    """A listener that notes what it is told."""

    def __init__(self, refuses=False):
        self.heard, self.open, self.refuses = [], {}, refuses

    def begin_capture(self, token, thread):
        if self.refuses:
            raise RuntimeError("refused")
        self.open[token] = thread
        self.heard.append("begin")

    def end_capture(self, token, *, succeeded):
        self.open.pop(token, None)
        self.heard.append("end" if succeeded else "failed")

    @contextlib.contextmanager
    def replaying(self):
        self.heard.append("replay begins")
        yield
        self.heard.append("replay ends")


@pytest.fixture
def graphs():
    assert not capture._listeners
    graph_class = make_graph_class()
    heard = []

    def listen(**settings):
        heard.append(Ear(**settings))
        capture.listen(heard[-1], graph_class)
        return heard[-1]

    yield graph_class, listen
    for ear in heard:
        capture.ignore(ear)
    assert (capture._listeners, capture._capturing, capture._originals) == ([], {}, {})


def test_a_capture_and_a_replay_are_told_in_order(graphs):
    graph_class, listen = graphs
    ear, graph = listen(), graph_class()
    assert graph.capture_begin("pool", capture_error_mode="relaxed") == "begin pool relaxed"
    assert list(ear.open.values()) == [threading.get_ident()]
    assert graph.capture_end() == "end"
    assert graph.replay() == "replay"
    assert ear.heard == ["begin", "end", "replay begins", "replay ends"]
    assert graph.calls == ["begin pool relaxed", "end", "replay"]


def test_everybody_is_told_of_every_graph(graphs):
    graph_class, listen = graphs
    ears, one, two = [listen(), listen()], graph_class(), graph_class()
    one.capture_begin()
    two.capture_begin()
    one.capture_end()
    assert [len(ear.open) for ear in ears] == [1, 1]
    two.capture_end()
    assert [ear.open for ear in ears] == [{}, {}]


@pytest.mark.parametrize("step", ["begin", "end"])
def test_a_capture_that_fails_is_over(step, graphs):
    graph_class, listen = graphs
    ear, graph = listen(), graph_class()
    if step == "end":
        graph.capture_begin()
    graph.fails = step
    with pytest.raises(RuntimeError, match=step):
        graph.capture_begin() if step == "begin" else graph.capture_end()
    assert (ear.open, ear.heard) == ({}, ["begin", "failed"])


def test_a_listener_that_refuses_keeps_the_capture_from_beginning(graphs):
    graph_class, listen = graphs
    willing, graph = listen(), graph_class()
    listen(refuses=True)
    with pytest.raises(RuntimeError, match="refused"):
        graph.capture_begin()
    assert (graph.calls, willing.open) == ([], {})


def test_reset_ends_a_capture_and_the_end_of_none_is_nothing(graphs):
    graph_class, listen = graphs
    ear, graph = listen(), graph_class()
    graph.capture_begin()
    graph.reset()
    graph.reset()
    assert (ear.open, ear.heard) == ({}, ["begin", "failed"])


def test_a_graph_that_is_dropped_in_the_middle_is_over_at_the_next_boundary(graphs):
    graph_class, listen = graphs
    ear, graph = listen(), graph_class()
    graph.capture_begin()
    del graph
    gc.collect()
    assert ear.open  # the collector may come while locks are held, so nothing happens in it
    capture.drain()
    assert ear.open == {}


def test_the_end_of_a_graph_that_is_gone_ends_no_other_one(graphs):
    """Also if the next graph lies where the former one lay, and begins before the end of that one is told."""
    graph_class, listen = graphs
    ear = listen()
    for _ in range(50):
        graph = graph_class()
        graph.capture_begin()
        graph.capture_end()
        del graph
    other = graph_class()
    other.capture_begin()
    capture.drain()
    assert len(ear.open) == 1
    other.capture_end()


def test_who_comes_in_the_middle_of_a_capture_is_told_of_it_and_of_its_thread(graphs):
    graph_class, listen = graphs
    listen()
    graph, begun, may_end = graph_class(), threading.Event(), threading.Event()

    def run():
        graph.capture_begin()
        begun.set()
        may_end.wait()
        graph.capture_end()

    thread = threading.Thread(target=run)
    thread.start()
    begun.wait()
    late = listen()
    told = list(late.open.values())
    may_end.set()
    thread.join()
    assert told == [thread.ident]
    assert late.open == {}


def test_the_class_is_as_it_was_when_the_last_one_has_gone(graphs):
    graph_class, listen = graphs
    before = {name: vars(graph_class)[name] for name in ("capture_begin", "capture_end", "replay", "reset")}
    one, two = listen(), listen()
    capture.ignore(one)
    assert vars(graph_class)["replay"] is not before["replay"]
    capture.ignore(two)
    assert {name: vars(graph_class)[name] for name in before} == before


def test_a_listener_that_is_dropped_counts_as_gone(graphs):
    graph_class, _ = graphs
    before = vars(graph_class)["replay"]
    ear = Ear()
    capture.listen(ear, graph_class)
    del ear
    gc.collect()
    assert vars(graph_class)["replay"] is before


def test_a_method_that_somebody_else_has_wrapped_since_stays(graphs):
    graph_class, listen = graphs
    ear = listen()
    ours = vars(graph_class)["replay"]
    graph_class.replay = lambda self: ours(self)
    theirs = vars(graph_class)["replay"]
    capture.ignore(ear)
    assert vars(graph_class)["replay"] is theirs
    assert graph_class().replay() == "replay"
    assert ear.heard == []
