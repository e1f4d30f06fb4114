"""Jobs that may wait: kept in an encrypted queue on disk until policy and link let them run.

Reference: docs/reference/jobs.md.
"""

from __future__ import annotations

from sdk.jobs.config import JobsConfig
from sdk.jobs.content import GenerateResult
from sdk.jobs.handles import AsyncJob, Job, JobResult
from sdk.jobs.store import JobStatus

__all__ = ["AsyncJob", "GenerateResult", "Job", "JobResult", "JobStatus", "JobsConfig"]
