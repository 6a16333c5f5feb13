// Causal attention inside documents in bf16: no score leaves a core's own cache, those that causality (or a window)
// hides are not computed, and sums and softmax are made in fp32 (`attention.h`). Documents of one block of keys are shared
// out among the threads, a document and a head of keys each; on longer ones, all threads work together, each on its own
// queries.
//
// For processors with AVX-512 BF16; others take the batched products of `products.py`, whose tests compare both.
//
// L positions of a document, D size of a head, H heads of queries, K heads of keys, G = H / K heads that share one. All
// tensors are (document, head, L, D), one document behind the other.

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include <omp.h>

#include "attention.h"

#ifdef __AVX512BF16__

namespace {

// All documents of a plan, and where a document's heads lie in a tensor of so many heads.
struct Documents {
  struct Document {
    int64_t slot, length;
  };
  std::vector<Document> all;
  int64_t H, K, D, window;
  float scale;

  Documents(const void* counts, const void* lengths, int64_t buckets, int64_t H, int64_t K, int64_t D, int64_t window,
            float scale)
      : H(H), K(K), D(D), window(window), scale(scale) {
    int64_t slot = 0;
    for (int64_t b = 0; b < buckets; ++b)
      for (int64_t i = 0; i < static_cast<const int64_t*>(counts)[b]; ++i, slot += all.back().length)
        all.push_back({slot, static_cast<const int64_t*>(lengths)[b]});
  }
  int64_t groups() const { return H / K; }
  int64_t at(const Document& document, int64_t heads, int64_t head) const {
    return (document.slot * heads + head * document.length) * D;
  }
  // Calls `alone(document, head of keys)` for the short ones, a thread each, and `together` for the others, on all.
  template <class Alone, class Together>
  void each(Alone alone, Together together) const {
    std::vector<Document> small;
    for (const Document& document : all)
      if (document.length > KEYS)
        for (int64_t head = 0; head < K; ++head) together(document, head);
      else small.push_back(document);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < static_cast<int64_t>(small.size()) * K; ++task) alone(small[task / K], task % K);
  }
};

// Puts keys [first, end), from a multiple of 16 on, where a block or all of them lie in the order of the instructions;
// `slice` says which sixteen of them.
struct Panels {
  uint32_t *keys_across, *values_across, *keys_along, *values_along;  // null: not needed
  void fill(const bf16* k, const bf16* v, int64_t first, int64_t end, int64_t D, int64_t slice) const {
    const int64_t key = first + 16 * slice, rows = std::min<int64_t>(16, end - key), to = 16 * slice * D / 2;
    if (keys_across) across(k + key * D, rows, D, keys_across + to);
    if (values_across) across(v + key * D, rows, D, values_across + to);
    if (keys_along) along(k + key * D, D, rows, D, keys_along + to);
    if (values_along) along(v + key * D, D, rows, D, values_along + to);
  }
  Keys of(int64_t first, int64_t end) const { return {keys_across, values_across, keys_along, values_along, first, end}; }
};

struct Forward {
  const Documents& documents;
  const bf16 *q, *k, *v;
  bf16* out;
  float* log_sum;
  uint32_t* room;  // panels of the longest document's keys and values

  void queries(const Documents::Document& document, int64_t head, int64_t first, const Keys& keys, Desk& desk) const {
    const int64_t at = documents.at(document, documents.H, head), L = document.length;
    const Head of{q + at, nullptr, nullptr, nullptr, L, documents.D, documents.window, documents.scale};
    forward_of(of, keys, first, std::min(QUERIES, L - first), out + at, log_sum + at / documents.D, desk);
  }
  void alone(const Documents::Document& document, int64_t head, Desk& desk) const {
    const int64_t at = documents.at(document, documents.K, head), L = document.length, G = documents.groups();
    const Panels panels{desk.keys_across, nullptr, nullptr, desk.values_along};
    for (int64_t slice = 0; slice < (L + 15) / 16; ++slice) panels.fill(k + at, v + at, 0, L, documents.D, slice);
    for (int64_t g = 0; g < G; ++g)
      for (int64_t first = 0; first < L; first += QUERIES) queries(document, head * G + g, first, panels.of(0, L), desk);
  }
  void together(const Documents::Document& document, int64_t head, Desk& desk) const {
    const int64_t at = documents.at(document, documents.K, head), L = document.length, G = documents.groups();
    const Panels panels{room, nullptr, nullptr, room + up_to(L, 16) * documents.D / 2};
    const int64_t blocks = (L + QUERIES - 1) / QUERIES;
#pragma omp for schedule(static)
    for (int64_t slice = 0; slice < (L + 15) / 16; ++slice) panels.fill(k + at, v + at, 0, L, documents.D, slice);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks * G; ++i)  // the longest first
      queries(document, head * G + i % G, (blocks - 1 - i / G) * QUERIES, panels.of(0, L), desk);
  }
};

struct Backward {
  const Documents& documents;
  const bf16 *q, *k, *v, *grad;
  const float *log_sum, *delta;
  bf16 *grad_q, *grad_k, *grad_v;
  float* room;               // sums of the longest document's queries, then panels of a block of keys
  std::vector<Desk*> desks;  // of all threads

  Head head_of(const Documents::Document& document, int64_t head) const {
    const int64_t at = documents.at(document, documents.H, head), D = documents.D;
    return {q + at, grad + at, log_sum + at / D, delta + at / D, document.length, D, documents.window, documents.scale};
  }
  void clear(Desk& desk) const {
    std::fill(desk.sum_k, desk.sum_k + KEYS * documents.D, 0.0f);
    std::fill(desk.sum_v, desk.sum_v + KEYS * documents.D, 0.0f);
  }
  void alone(const Documents::Document& document, int64_t head, Desk& desk) const {
    const int64_t D = documents.D, at = documents.at(document, documents.K, head), L = document.length;
    const Panels panels{desk.keys_across, desk.values_across, desk.keys_along, nullptr};
    for (int64_t slice = 0; slice < (L + 15) / 16; ++slice) panels.fill(k + at, v + at, 0, L, D, slice);
    clear(desk);
    for (int64_t g = head * documents.groups(); g < (head + 1) * documents.groups(); ++g)
      for (int64_t first = 0; first < L; first += QUERIES) {
        const int64_t count = std::min(QUERIES, L - first);
        std::fill(desk.sums, desk.sums + count * D, 0.0f);
        backward_of(head_of(document, g), panels.of(0, L), first, count, desk.sums, desk);
        round_to(grad_q + documents.at(document, documents.H, g) + first * D, desk.sums, count * D, documents.scale);
      }
    round_to(grad_k + at, desk.sum_k, L * D, documents.scale);
    round_to(grad_v + at, desk.sum_v, L * D, 1.0f);
  }
  void together(const Documents::Document& document, int64_t head, Desk& desk) const {
    const int64_t D = documents.D, at = documents.at(document, documents.K, head), L = document.length;
    const int64_t G = documents.groups(), of_group = documents.at(document, documents.H, head * G);
    uint32_t* words = reinterpret_cast<uint32_t*>(room + G * L * D);
    const Panels panels{words, words + KEYS * D / 2, words + KEYS * D, nullptr};
#pragma omp for schedule(static)
    for (int64_t row = 0; row < G * L; ++row) std::fill(room + row * D, room + (row + 1) * D, 0.0f);
    for (int64_t key = 0; key < L; key += KEYS) {
      const int64_t end = std::min(L, key + KEYS), last = documents.window ? std::min(L, end + documents.window - 1) : L;
      const int64_t blocks = (last - key + QUERIES - 1) / QUERIES;
#pragma omp for schedule(static)
      for (int64_t slice = 0; slice < (end - key + 15) / 16; ++slice) panels.fill(k + at, v + at, key, end, D, slice);
      clear(desk);
#pragma omp for schedule(static, 1)
      for (int64_t i = 0; i < blocks * G; ++i) {
        const int64_t g = i % G, first = key + i / G * QUERIES;
        backward_of(head_of(document, head * G + g), panels.of(key, end), first, std::min(QUERIES, last - first),
                    room + (g * L + first) * D, desk);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < end - key; ++row)
        for (const auto& [sums, to, scale] : {std::tuple(&Desk::sum_k, grad_k, documents.scale), {&Desk::sum_v, grad_v, 1.0f}}) {
          float* total = desks[0]->*sums + row * D;
          for (size_t other = 1; other < desks.size(); ++other)
#pragma omp simd
            for (int64_t d = 0; d < D; ++d) total[d] += (desks[other]->*sums)[row * D + d];
          round_to(to + at + (key + row) * D, total, D, scale);
        }
    }
#pragma omp for schedule(static)
    for (int64_t row = 0; row < G * L; ++row) round_to(grad_q + of_group + row * D, room + row * D, D, documents.scale);
  }
};

template <class T>
T* as(void* p) { return static_cast<T*>(p); }
template <class T>
const T* as(const void* p) { return static_cast<const T*>(p); }

}  // namespace
#endif

extern "C" {

// Positions up to which a document is one thread's; 0 where this processor does not compute them.
int64_t document_attention_block() {
#ifdef __AVX512BF16__
  return KEYS;
#else
  return 0;
#endif
}

#ifdef __AVX512BF16__
void document_attention_bf16(const void* q, const void* k, const void* v, void* out, void* log_sum, void* room,
                             const void* counts, const void* lengths, int64_t buckets, int64_t H, int64_t K, int64_t D,
                             int64_t window, float scale) {
  const Documents documents(counts, lengths, buckets, H, K, D, window, scale);
  const Forward pass{documents, as<bf16>(q), as<bf16>(k), as<bf16>(v), as<bf16>(out), as<float>(log_sum), as<uint32_t>(room)};
#pragma omp parallel
  {
    Desk desk(D);
    documents.each([&](const auto& document, int64_t head) { pass.alone(document, head, desk); },
                   [&](const auto& document, int64_t head) { pass.together(document, head, desk); });
  }
}

void document_attention_backward_bf16(const void* q, const void* k, const void* v, const void* grad, const void* log_sum,
                                      const void* delta, void* grad_q, void* grad_k, void* grad_v, void* room,
                                      const void* counts, const void* lengths, int64_t buckets, int64_t H, int64_t K,
                                      int64_t D, int64_t window, float scale) {
  const Documents documents(counts, lengths, buckets, H, K, D, window, scale);
  Backward pass{documents, as<bf16>(q), as<bf16>(k), as<bf16>(v), as<bf16>(grad), as<float>(log_sum), as<float>(delta),
                as<bf16>(grad_q), as<bf16>(grad_k), as<bf16>(grad_v), as<float>(room), {}};
#pragma omp parallel
  {
    Desk desk(D);
#pragma omp single
    pass.desks.resize(omp_get_num_threads());
    pass.desks[omp_get_thread_num()] = &desk;
#pragma omp barrier
    documents.each([&](const auto& document, int64_t head) { pass.alone(document, head, desk); },
                   [&](const auto& document, int64_t head) { pass.together(document, head, desk); });
  }
}
#endif
}
