"""What /metrics tells Prometheus."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)  # seconds


class Metrics:
    """All metrics of one server, in a registry of their own. Gauges ask their functions when they are read."""

    def __init__(self):
        self.registry = CollectorRegistry()
        own = {"namespace": "squeeze_fast", "registry": self.registry}
        self.requests = Counter("requests", "Requests that have ended", ["endpoint", "outcome"], **own)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts", **own)
        self.cached_tokens = Counter("cached_tokens", "Tokens of prompts that a kept cache held already", **own)
        self.new_tokens = Counter("new_tokens", "Tokens of answers", **own)
        self.step_seconds = Histogram("step_seconds", "A step of all rows, prompts included", buckets=STEPS, **own)
        self.kept_hits = Counter("kept_conversation_hits", "Turns that went on from a kept conversation", **own)
        self._slots = Gauge("plan_slots", "Slots of a layer, in each row", ["layer"], **own)
        self._plan = Gauge("plan", "What the plan was made from", ["source"], **own)
        self._own = own

    def gauge(self, name: str, about: str, value: Callable[[], float]) -> None:
        Gauge(name, about, **self._own).set_function(value)

    def planned(self, slots: Sequence[int], source: str) -> None:
        for layer, count in enumerate(slots):
            self._slots.labels(layer).set(count)
        self._plan.labels(source).set(1)

    def text(self) -> bytes:
        return generate_latest(self.registry)
