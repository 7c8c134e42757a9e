// Reads a call of one of the kernels from stdin, makes it, and writes its buffers to stdout. The kernels stand before
// this text. All arguments are 64-bit words: as many addresses as there are buffers, then integers.

#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

namespace {

int64_t word() {
  int64_t value;
  if (std::fread(&value, sizeof value, 1, stdin) != 1) std::exit(2);
  return value;
}

template <size_t... I>
void call(void (*function)(), const std::vector<int64_t>& a, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(decltype(int64_t(I))...)>(function)(a[I]...);
}

}  // namespace

int main() {
  void (*const functions[])() = {
      reinterpret_cast<void (*)()>(diffusion_step), reinterpret_cast<void (*)()>(q_sample),
      reinterpret_cast<void (*)()>(q_posterior), reinterpret_cast<void (*)()>(normal),
      reinterpret_cast<void (*)()>(to_uint8), reinterpret_cast<void (*)()>(transition_logprob)};
  const int64_t function = word(), buffers = word(), integers = word();
  std::vector<std::vector<char>> memory(buffers);
  std::vector<int64_t> arguments;
  for (auto& buffer : memory) {
    const int64_t size = word();  // -1: a null pointer
    buffer.resize(size < 0 ? 0 : size);
    if (size > 0 && std::fread(buffer.data(), size, 1, stdin) != 1) return 2;
    arguments.push_back(size < 0 ? 0 : reinterpret_cast<int64_t>(buffer.data()));
  }
  for (int64_t i = 0; i < integers; i++) arguments.push_back(word());
  arguments.resize(32);  // what a function does not take, it does not see
  call(functions[function], arguments, std::make_index_sequence<32>());
  for (const auto& buffer : memory) {
    if (!buffer.empty()) std::fwrite(buffer.data(), buffer.size(), 1, stdout);
  }
  return 0;
}
