"""What the fork server of `warm_processes` imports before anything is forked from it."""

from __future__ import annotations

import os

from engine import environment
from slipstream.settings import Settings
from slipstream.worker_settings import WorkerSettings

# What a worker sets before it imports vLLM; here the import comes first.
environment.prepare(Settings(worker=WorkerSettings(threads=1)), os.environ)

import vllm.v1.engine.core  # noqa: E402
import vllm.v1.engine.utils  # noqa: E402
import vllm.v1.executor.uniproc_executor  # noqa: E402
import vllm.v1.worker.cpu_worker  # noqa: E402
from vllm import LLM  # noqa: E402, F401
from vllm.model_executor.models import llama  # noqa: E402, F401

import decode_worker.process  # noqa: E402, F401
import engine.vllm_engine  # noqa: E402, F401
import kv_transfer.connector  # noqa: E402, F401
import planner.server  # noqa: E402, F401
import prefill_worker.process  # noqa: E402, F401
from tests.support import fault_cluster, plain_engine, warm_processes  # noqa: E402, F401

fault_cluster.cut_small()
vllm.v1.engine.utils.get_mp_context = warm_processes.engine_context
warm_processes.check_forkable()
