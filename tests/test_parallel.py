"""The loop over XLA's threads, on a pool that has no thread to spare: the case that deadlocks "schedule, then wait"."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
SOURCE = """
#include <cstdio>
#include <functional>
#include <vector>
#include "parallel.h"

int main() {
  std::vector<std::function<void()>> waiting;
  const fg3dgs::Executor busy{4, [&](std::function<void()> task) { waiting.push_back(std::move(task)); }};
  std::vector<int> visits(1000, 0);
  {
    const auto body = [&](int worker, int64_t item) { visits[item] += 1 + worker; };
    fg3dgs::parallel_for(busy, 1000, body);
  }
  for (auto& task : waiting) task();  // the threads come back after the call has returned: nothing is left to do
  for (int v : visits) if (v != 1) return 1;
  std::printf("%zu tasks came late\\n", waiting.size());
}
"""


@pytest.mark.skipif(sys.platform == "win32", reason="calls the compiler as Unix does")
def test_a_call_finishes_by_itself_where_no_thread_is_free(tmp_path):
    source, program = tmp_path / "busy.cc", tmp_path / "busy"
    source.write_text(SOURCE)
    compiler = (sysconfig.get_config_var("CXX") or "c++").split()[0]
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{CSRC}", source, "-o", program, "-pthread"], check=True)
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)  # seconds; a deadlock lasts for ever
    assert done.returncode == 0 and done.stdout == "3 tasks came late\n"
