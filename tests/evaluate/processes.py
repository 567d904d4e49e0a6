"""Processes for tests that kill or listen to an evaluation: forked from one that has loaded everything, in no time."""

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.evaluate.small_run", "openai", "openai.resources.chat"])
