"""Both clients' common half: settings, requests made from arguments, results made from outputs."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from nearfar.errors import BundleError, ConfigError, InvalidInput
from nearfar.generation import ChatMessage, GenerationOptions, Prompt
from nearfar.units import Deadline
from sdk import assembly, requests
from sdk.config import CloudConfig, Config
from sdk.core import Completed, Core
from sdk.knowledge import Knowledge
from sdk.plans import Plans
from sdk.policy import Policy
from sdk.requests import Request
from sdk.results import (
    BatchUsage,
    ClassifyResult,
    EmbedResult,
    InferResult,
    ModelInfo,
    Timings,
)

if TYPE_CHECKING:
    import numpy as np

    from edge_runtime import EdgeGeneration
    from nearfar.engines.base import CancelToken, SessionOptions
    from sdk.answer import AnswerState
    from sdk.beginnings import OpenCloud
    from sdk.cloud.egress import Permit
    from sdk.cloud.resumption import ResumableStream
    from sdk.jobs.config import JobsConfig
    from sdk.jobs.desk import Desk
    from sdk.records.ring import Recorder
    from sdk.routing import RouteDecision
    from sdk.routing.types import Mode, Objective
    from sdk.sharing.config import CacheConfig
    from sdk.sources import EdgeSource
    from sdk.steps import Step


class RequestOptions(TypedDict, total=False):
    """Keyword options that every request takes.

    Attributes:
        sensitivity: Data class of the content, one of the policy's; without one the client's
            default holds, and without that the policy's strictest: unlabelled data is protected.
        deadline_ms: Milliseconds until the answer is due, all attempts together. Without one the
            configuration's holds; ``math.inf`` turns it off.
        mode: ``auto``, ``edge_only``, ``prefer_edge``, ``prefer_cloud`` or ``cloud_only``, within
            policy.
        objective: ``latency``, ``quality``, ``cost`` or ``energy``, among routes that meet the
            deadline.
        purpose: What the answer is for; policy may have rules about it.
        tenant: On whose behalf the app asks; policy may have rules about it.
        priority: 0 (background) to 9 (urgent), for the cloud's queue.
        version: Exact version of the model; the newest by default.
        min_agreement: How often answers must agree with the cloud model's, such as 0.98: the device
            answers where its calibrated confidence allows it, else the cloud. 0 turns off what
            the configuration says. Not for text generation.
        require_agreement: Raise `AgreementNotMet` instead of returning an answer that is marked as
            not covered.
    """

    sensitivity: str | None
    deadline_ms: float | None
    mode: Mode | None
    objective: Objective | None
    purpose: str | None
    tenant: str | None
    priority: int
    version: str | None
    min_agreement: float | None
    require_agreement: bool | None


class GenerateOptions(RequestOptions, total=False):
    """Keyword options of `generate` and `chat`.

    Attributes:
        max_new_tokens: Upper bound of the answer (256).
        temperature: 0 (the default) decodes greedily.
        top_p: Nucleus sampling; 1 turns it off.
        top_k: Candidates per token; 0 turns it off.
        seed: Makes sampling reproducible on one engine.
        stop: Strings that end the answer and are not part of it.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]


class Calls:
    """Base of `Client` and `AsyncClient`; makes no request itself.

    Args:
        config: What a `nearfar.toml` says, or the path of one.
        models: Directory of bundles; overrides the configuration.
        jobs: Where jobs wait (see `submit`); overrides the configuration.
        cache: Models whose equal requests share their computation; overrides the configuration.
        telemetry: Tell OpenTelemetry about requests; overrides the configuration.
        cloud: The cloud runtime, or several of them; overrides the configuration.
        policy: Parsed policy, or the path of a policy file; overrides the configuration. Without
            any, everything stays on the device.
        sensitivity: Data class of requests that state none; without one they are taken to be of
            the policy's strictest class.
        mode: Default of every request.
        objective: Default of every request.
        deadline_ms: Default of every request.
        edge: ``False`` runs nothing on this device, and needs no local models.
        edge_options: Engine settings of the device.
        calibrations: Folder of what `nearfar calibrate` wrote; overrides the configuration.

    Raises:
        ConfigError: A file or an argument does not parse or fit.
        BundleError: There is no such model store.
    """

    _is_closed = False
    _recorder: Recorder | None = None

    def __init__(
        self,
        config: Config | str | Path | None = None,
        *,
        models: str | Path | None = None,
        cloud: CloudConfig | Sequence[CloudConfig] | None = None,
        policy: Policy | str | Path | None = None,
        sensitivity: str | None = None,
        mode: Mode | None = None,
        objective: Objective | None = None,
        deadline_ms: float | None = None,
        edge: bool = True,
        edge_options: SessionOptions | None = None,
        jobs: JobsConfig | None = None,
        cache: Mapping[str, CacheConfig] | None = None,
        telemetry: bool | None = None,
        calibrations: str | Path | None = None,
    ) -> None:
        if config is None:
            config = Config()
        elif not isinstance(config, Config):
            from sdk.config_file import load_config

            config = load_config(config)
        self._mode: Mode = mode or config.routing.mode
        self._objective: Objective = objective or config.routing.objective
        self._deadline_ms = deadline_ms if deadline_ms is not None else config.routing.deadline_ms
        requests.check_settings(self._mode, self._objective, 5)
        store = Path(models).expanduser() if models is not None else config.models_store
        rules = assembly.policy_of(policy if policy is not None else config.policy_file)
        self._edge = (
            assembly.edge_of(store, edge_options, config.trusted_keys)
            if edge and store is not None
            else None
        )
        self._link, self._valuation = assembly.clouds_of(cloud, config)
        if self._edge is None and self._link is None:
            raise ConfigError(
                "This client has neither local models nor a cloud",
                field="models",
                fix="Give models=DIRECTORY or cloud=CloudConfig(…), or set them in nearfar.toml",
            )
        default = sensitivity or config.default_sensitivity
        if default is not None and default not in rules.classes:
            raise ConfigError(
                f"The default sensitivity {default!r} is not a class of the policy",
                field="sensitivity",
                fix=f"Use one of: {', '.join(rules.classes)}",
            )
        known = Knowledge(edge=self._edge, link=self._link, state_file=config.routing.state)
        self._known = known
        self._jobs_config = jobs or config.jobs
        self._plans = Plans(known)
        self._check_objective(self._objective, is_config=True)
        self._usual = self._settings(deadline_ms=math.inf)
        self._core = Core(
            policy=rules,
            default_sensitivity=default,
            known=known,
            confidence=config.routing.confidence,
            cascade=assembly.cascade_of(config, calibrations),
            hedge_budget=config.routing.hedge_budget,
            retry_budget=config.routing.retry_budget,
            valuation=self._valuation,
        )
        caches = config.caches if cache is None else cache
        self._sharing = assembly.sharing_of(caches, self._core) if caches else None
        is_traced = config.telemetry if telemetry is None else telemetry
        self._telemetry = assembly.telemetry_of(self._edge) if is_traced else None
        if config.routing.record is not None:
            self._recorder = assembly.recorder_of(config.routing.record, known, self._core)

    @property
    def policy(self) -> Policy:
        """The policy that this client asks."""
        return self._core.policy

    @property
    def clouds(self) -> tuple[str, ...]:
        """Names of the clouds that this client may ask, as decisions name them."""
        return tuple(endpoint.name for endpoint in self._known.endpoints)

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise InvalidInput(
                "This client is closed", field="client", fix="Make a new one, or close it later"
            )

    # -- arguments to requests -------------------------------------------------------------------

    def _check_objective(self, objective: Objective, *, is_config: bool = False) -> None:
        """Refuse an objective that no price says anything about."""
        if objective in ("cost", "energy"):
            from sdk.valuation import UNPRICED

            (self._valuation or UNPRICED).check(objective, is_config=is_config)

    def _common(self, options: Any) -> dict[str, Any]:
        """The settings of a request; those of one that states none are made once."""
        if options or self._deadline_ms is not None:
            return self._settings(**options)
        return self._usual

    def _settings(
        self,
        *,
        sensitivity: str | None = None,
        deadline_ms: float | None = None,
        mode: Mode | None = None,
        objective: Objective | None = None,
        purpose: str | None = None,
        tenant: str | None = None,
        priority: int = 5,
        version: str | None = None,
        min_agreement: float | None = None,
        require_agreement: bool | None = None,
    ) -> dict[str, Any]:
        mode = mode or self._mode
        objective = objective or self._objective
        requests.check_settings(mode, objective, priority)
        if objective != "latency":
            self._check_objective(objective)
        settings: dict[str, Any] = {
            "deadline": Deadline.after_ms(
                deadline_ms if deadline_ms is not None else self._deadline_ms
            ),
            "sensitivity": sensitivity,
            "mode": mode,
            "objective": objective,
            "purpose": purpose,
            "tenant": tenant,
            "priority": priority,
            "version": version,
        }
        if min_agreement is not None or require_agreement is not None:
            from sdk.cascade.settings import checked

            settings |= checked(min_agreement, require_agreement)
        return settings

    def _infer_request(
        self, model: str, feeds: Mapping[str, np.ndarray], options: RequestOptions
    ) -> Request:
        if not isinstance(feeds, (dict, Mapping)):  # most are; asking an abstract class is slower
            raise InvalidInput(
                f"feeds is a {type(feeds).__name__}",
                field="feeds",
                fix="Give a dict of input name to numpy array",
            )
        return Request(
            method="infer",
            model=model,
            feeds=feeds,
            size=requests.tensor_size(feeds),
            **self._common(options),
        )

    def _embed_request(self, model: str, texts: Sequence[str], options: RequestOptions) -> Request:
        items = requests.texts_of(texts)
        return Request(
            method="embed",
            model=model,
            form="text",
            items=items,
            size=requests.items_size(items),
            **self._common(options),
        )

    def _classify_request(
        self, model: str, data: bytes | str | Path, top_k: int, options: RequestOptions
    ) -> Request:
        if top_k < 1:
            raise InvalidInput(f"top_k is {top_k}", field="top_k", fix="It must be 1 or more")
        item = requests.data_of(data)
        return Request(
            method="classify",
            model=model,
            form="text" if isinstance(item, str) else "bytes",
            items=(item,),
            top_k=top_k,
            size=requests.items_size((item,)),
            **self._common(options),
        )

    def _generate_request(self, model: str, prompt: Prompt, options: GenerateOptions) -> Request:
        common = dict(options)
        sampling = _sampling(
            **{name: common.pop(name) for name in _SAMPLING if name in common}  # type: ignore[arg-type]
        )
        return Request(
            method="generate",
            model=model,
            prompt=prompt,
            options=sampling,
            size=requests.prompt_size(prompt, sampling),
            **self._common(common),
        )

    def _explain_request(
        self,
        model: str,
        *,
        prompt: str | None,
        messages: Sequence[Mapping[str, str] | ChatMessage] | None,
        texts: Sequence[str] | None,
        data: bytes | str | Path | None,
        feeds: Mapping[str, np.ndarray] | None,
        options: GenerateOptions,
        top_k: int = 1,
        input_tokens: int | None = None,
        upload_bytes: int | None = None,
    ) -> Request:
        given = [x for x in (prompt, messages, texts, data, feeds) if x is not None]
        if not given and (input_tokens is not None or upload_bytes is not None):
            return self._sized_request(model, input_tokens, upload_bytes, options)
        if input_tokens is not None or upload_bytes is not None:
            raise InvalidInput(
                "There is an input, and a size beside it",
                field="upload_bytes",
                fix="Leave input_tokens and upload_bytes out: the input has its own size",
            )
        if len(given) != 1:
            raise InvalidInput(
                f"There are {len(given)} inputs",
                field="prompt",
                fix="Give exactly one of prompt, messages, texts, data, feeds",
            )
        if prompt is not None:
            return self._generate_request(model, requests.text_prompt(prompt), options)
        if messages is not None:
            return self._generate_request(model, requests.chat_prompt(messages), options)
        _check_no_sampling(options)
        common: Any = options
        if texts is not None:
            return self._embed_request(model, texts, common)
        if data is not None:
            return self._classify_request(model, data, top_k, common)
        assert feeds is not None
        return self._infer_request(model, feeds, common)

    def _sized_request(
        self,
        model: str,
        input_tokens: int | None,
        upload_bytes: int | None,
        options: GenerateOptions,
    ) -> Request:
        """A request without content; see `sdk.sizes`."""
        from sdk import sizes

        manifest = next((info.manifest for info in self._models() if info.name == model), None)
        method = sizes.method_of(manifest, input_tokens)
        common: Any = dict(options)
        sampling = None
        if method == "generate":
            sampling = _sampling(**{n: common.pop(n) for n in _SAMPLING if n in common})
        _check_no_sampling(common)
        return sizes.sized_request(
            model,
            method,
            manifest,
            input_tokens=input_tokens,
            upload_bytes=upload_bytes,
            options=sampling,
            common=self._common(common),
        )

    def _life(self, request: Request) -> Generator[Step, Any, Completed]:
        """The life of one batch, as it is performed here."""
        life = self._core.run(request)
        return life if self._telemetry is None else self._telemetry.run(request, life)

    async def _ask_cloud(
        self, state: AnswerState, permit: Permit, decision: RouteDecision
    ) -> ResumableStream:
        """Begin a streamed answer on the cloud, without waiting for its first piece."""
        request, link = state.request, self._link
        assert link is not None
        with self._known.guarded(request, decision) as guard:
            guard.is_answered = state.is_answered_when_open
            stream = await link.at(decision.inputs.endpoint).generate(
                permit,
                model=request.model,
                prompt=state.prompt(),
                options=state.options(),
                deadline=request.deadline,
                version=request.version,
                priority=request.priority,
                request_id=state.request_id(),
                trace=state.trace,
            )
        state.opened()
        stream.limit_pauses(*state.pauses(decision))
        return stream

    def _edge_source(
        self, generation: EdgeGeneration, cancel: CancelToken, state: AnswerState
    ) -> EdgeSource:
        """The pieces of an answer that the device gives, until the deadline."""
        from sdk.sources import EdgeSource

        deadline, edge = state.request.deadline, self._edge
        assert edge is not None
        watched = edge.watch(deadline, cancel) if deadline.is_set else None
        model = state.request.model
        return EdgeSource(
            generation, cancel, deadline, watched,
            lambda is_answered: edge.ended(model, is_answered=is_answered),
        )  # fmt: skip

    def _cloud_beside(self, state: AnswerState, again: RouteDecision) -> OpenCloud | None:
        """What begins an answer on the cloud that the device is late with, if that can be."""
        boarded = self._core.board_beside(state.request, again)
        if boarded is None:
            return None
        permit, _ = boarded
        state.begins_beside("cloud", permit)
        return lambda: self._ask_cloud(state, permit, again)

    def _desk(self) -> Desk:
        """The way to the queue of jobs, opened."""
        self._refuse_if_closed()
        if self._jobs_config is None:
            raise ConfigError(
                "This client has no queue of jobs",
                field="jobs",
                fix='Add a [jobs] section with file = "…", or give jobs=JobsConfig(file=…)',
            )
        from sdk.jobs.desk import Desk

        return Desk(self._jobs_config, self._core)

    def _job_request(
        self, model: str, options: Any, inputs: Mapping[str, Any]
    ) -> tuple[Request, float | None]:
        """A request to be kept, and its time for each attempt: the configured default is not meant
        for what may wait."""
        options = dict(options)
        deadline_ms = options.pop("deadline_ms", None)
        if not Deadline.after_ms(deadline_ms).is_set:
            deadline_ms = None
        options["deadline_ms"] = math.inf
        # Of a classification it is the number of labels, of a text how tokens are drawn.
        top_k = 1 if inputs["data"] is None else options.pop("top_k", 1)
        request = self._explain_request(model, options=options, top_k=top_k, **inputs)
        return request, deadline_ms

    # -- outputs to results ----------------------------------------------------------------------

    @staticmethod
    def _infer_result(done: Completed) -> InferResult:
        return InferResult(outputs=done.answer.outputs, **_facts(done))

    @staticmethod
    def _embed_result(done: Completed) -> EmbedResult:
        vectors = _output(done, done.manifest.embedding_output)
        rows = done.request.rows
        if vectors.ndim != 2 or vectors.shape[0] != rows:
            raise BundleError(
                f"Model {done.request.model!r} gave vectors of shape {list(vectors.shape)} "
                f"for {rows} texts",
                fix="Its manifest must name an `embedding_output` of shape [-1, dimensions]",
            )
        return EmbedResult(vectors=vectors.astype("float32", copy=False), **_facts(done))

    @staticmethod
    def _classify_result(done: Completed) -> ClassifyResult:
        from nearfar.processing.classification import top_labels

        scores = _output(done, done.manifest.label_output)
        top = top_labels(scores[0], done.manifest.labels, done.request.top_k)
        label, score = top[0]
        return ClassifyResult(label=label, score=score, top=tuple(top), **_facts(done))

    def _result(self, done: Completed) -> InferResult | EmbedResult | ClassifyResult:
        method = done.request.method
        if method == "infer":
            return self._infer_result(done)
        return self._embed_result(done) if method == "embed" else self._classify_result(done)

    def _models(self) -> tuple[ModelInfo, ...]:
        return self._known.models()


_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def _check_no_sampling(options: Mapping[str, Any]) -> None:
    for name in _SAMPLING:
        if name in options:
            raise InvalidInput(
                f"{name} is given for a model that generates no text",
                field=name,
                fix="Leave it out, or ask with a prompt or messages",
            )


def _sampling(
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
) -> GenerationOptions:
    return requests.generation_options(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
    )


def _output(done: Completed, name: str | None) -> np.ndarray:
    outputs = done.answer.outputs
    if name is None:
        return next(iter(outputs.values()))
    found = outputs.get(name)
    if found is None:
        raise BundleError(
            f"Model {done.request.model!r} gave no output {name!r}",
            fix=f"Its outputs are: {', '.join(outputs)}; correct the bundle's manifest",
        )
    return found


def _facts(done: Completed) -> dict[str, Any]:
    answer = done.answer
    network_ms = 0.0
    if done.route.name == "cloud":
        network_ms = max(0.0, answer.total_ms - answer.queue_ms - answer.compute_ms)
    output_bytes = 0
    for array in answer.outputs.values():
        output_bytes += array.nbytes
    return {
        "route": done.route,
        "decision": done.decision,
        "timings": Timings(
            total_ms=done.total_ms,
            queue_ms=answer.queue_ms,
            compute_ms=answer.compute_ms,
            network_ms=network_ms,
        ),
        "usage": BatchUsage(items=done.request.rows, output_bytes=output_bytes),
        "variant": answer.variant,
        "execution_provider": answer.execution_provider,
        "bytes_sent": done.bytes_sent,
        "agreement": done.agreement,
    }
