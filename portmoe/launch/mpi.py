"""Ranks started by an MPI launcher, known by the variables it gives each of them."""

import os
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from portmoe.errors import BackendError


@dataclass(frozen=True)
class Family:
    """The variables of one family of launchers.

    Attributes:
        jobs: variables that have the same value on all ranks of a job and another in other jobs.
    """

    name: str
    rank: str
    size: str
    local_rank: str
    local_size: str
    jobs: tuple[str, ...] = ()


_SAME_FOR_ALL = ("PMIX_NAMESPACE", "PMI_JOBID", "OMPI_MCA_ess_base_jobid", "LSB_JOBID", "PBS_JOBID")
FAMILIES = (
    Family("Open MPI", *(f"OMPI_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Family("MVAPICH", *(f"MV2_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Family("MVAPICH", *(f"MVP_COMM_WORLD_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Family("jsrun", *(f"JSM_NAMESPACE_{what}" for what in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    Family(
        "flux", "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", "FLUX_LOCAL_SIZE", ("FLUX_JOB_ID",)
    ),
    # MPICH, and others that speak its protocol.
    Family("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Family("PMIx", "PMIX_RANK", "PMIX_SIZE", "PMIX_LOCAL_RANK", "PMIX_LOCAL_SIZE"),
)


def family_of(environ: Mapping[str, str]) -> Family | None:
    """The first family that gives this process a rank; None where none does."""
    return next((family for family in FAMILIES if environ.get(family.rank)), None)


def rendezvous(family: Family, environ: Mapping[str, str], one_machine: bool) -> tuple[str, str | None]:
    """Where rank 0 listens: an address, and a port that all ranks of this job come to by themselves.

    MASTER_ADDR and MASTER_PORT go before. The port is None where MASTER_PORT is given.

    Raises:
        BackendError: the ranks are on several machines and nothing says where rank 0 is.
    """
    address = environ.get("MASTER_ADDR")
    if not address and not one_machine:
        raise BackendError(
            f"{family.name} started ranks on several machines, and its variables do not say where rank 0 is; "
            "set MASTER_ADDR to that host, and MASTER_PORT to a free port there, for all ranks, as in "
            "`mpirun -x MASTER_ADDR=$(hostname) -x MASTER_PORT=29500 …` (mpiexec: -genv NAME VALUE)"
        )
    job = next((environ[name] for name in (*family.jobs, *_SAME_FOR_ALL) if environ.get(name)), "")
    key = f"{family.name} {job or os.getuid()} {socket.gethostname() if one_machine else ''}"
    port = None if "MASTER_PORT" in environ else str(zlib.crc32(key.encode("utf-8", "surrogateescape")))
    return address or "127.0.0.1", port
