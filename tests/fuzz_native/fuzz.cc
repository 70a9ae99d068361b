// The native core under whatever bytes arrive: libFuzzer's harness, and a plain driver for compilers without it.
//
// Every case runs on one thread, and some again through a pool; the bits must be equal. The pools have no
// threads of their own, so that every crash happens again: threads.cc has real ones.
#include <functional>

#include "cases.h"

namespace {

using namespace fuzz;

const Executor kAlone{1, nullptr};

// Its tasks run at once and leave the caller nothing, or only after the call has returned.
class Pool {
 public:
  explicit Pool(uint32_t kind) : late_(kind & 1), threads_(kind & 2 ? 2 : 5) {}
  ~Pool() {
    for (auto& task : waiting_) task();
  }
  Executor executor() {
    return {threads_, [this](std::function<void()> task) {
              if (late_) return waiting_.push_back(std::move(task));
              task();
            }};
  }

 private:
  bool late_;
  int threads_;
  std::vector<std::function<void()>> waiting_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const uint32_t kind = bytes.byte();
  with_case(bytes, [kind](const auto& c) {
    const Results alone = c.run(kAlone);
    alone.expect_written();
    c.check(alone);
    if (kind & 12) return;  // once is enough for most
    Pool pool(kind);
    expect(alone.same_bits(c.run(pool.executor())), "the bits depend on the threads");
  });
  return 0;
}

#ifndef FG_LIBFUZZER
#include <sanitizer/common_interface_defs.h>

namespace {

uint8_t input[128];
size_t input_size;

// As libFuzzer does: what crashed is kept in a file, which a later run takes as its argument.
void keep_input() {
  std::FILE* file = std::fopen("crash-input", "wb");
  if (!file) return;
  std::fwrite(input, 1, input_size, file);
  std::fclose(file);
  std::fprintf(stderr, "the input is in ./crash-input\n");
}

uint64_t next_random(uint64_t* state) {  // splitmix64
  uint64_t z = *state += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

void read_input(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  expect(file, "no such input");
  input_size = std::fread(input, 1, sizeof input, file);
  std::fclose(file);
}

}  // namespace

// [-runs=N] [-seed=S] [FILE...]: pseudo-random inputs, or those in the files.
int main(int argc, char** argv) {
  uint64_t runs = 100000, seed = 1;
  bool files = false;
  __sanitizer_set_death_callback(keep_input);
  for (int i = 1; i < argc; ++i) {
    if (!std::strncmp(argv[i], "-runs=", 6)) runs = std::strtoull(argv[i] + 6, nullptr, 10);
    if (!std::strncmp(argv[i], "-seed=", 6)) seed = std::strtoull(argv[i] + 6, nullptr, 10);
    if (argv[i][0] == '-') continue;
    files = true;
    read_input(argv[i]);
    LLVMFuzzerTestOneInput(input, input_size);
  }
  uint64_t state = seed;
  for (uint64_t i = 0; !files && i < runs; ++i) {
    input_size = 8 + next_random(&state) % (sizeof input - 8);
    for (size_t k = 0; k < input_size; k += 8) {
      const uint64_t bits = next_random(&state);
      std::memcpy(input + k, &bits, 8);
    }
    LLVMFuzzerTestOneInput(input, input_size);
  }
  if (!files) std::fprintf(stderr, "Done %llu runs\n", static_cast<unsigned long long>(runs));
}
#endif
