// Runs llama.cpp through its own C interface, and says how long each token took.
//
// usage: llama_peer MODEL.gguf THREADS PROMPT_TOKENS GENERATE_TOKENS mmap|read POLL
//
// Reads a prompt of made-up ids, idx * 7919 modulo the vocabulary as `tilert-mk bench` does, then
// chooses the most likely token GENERATE_TOKENS times. The first pass is not timed. Prints one JSON
// object: the ids, the time to the first token, and the times between tokens. POLL, 0 to 100, is
// how busily llama.cpp's own threads wait; a build with OpenMP does not use it.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "llama.h"

enum { STEP_TOKENS_MAX = 512 };

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e6 + t.tv_nsec / 1e3;
}

static void quiet(enum ggml_log_level level, const char *text, void *data) {
  (void)data;
  if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

static void fail(const char *what) {
  fprintf(stderr, "llama_peer: %s\n", what);
  exit(1);
}

static llama_token best(struct llama_context *context, int vocab_size) {
  const float *logits = llama_get_logits_ith(context, -1);
  int best = 0;
  for (int i = 1; i < vocab_size; i++)
    if (logits[i] > logits[best]) best = i;
  return best;
}

// Generates `count` tokens into `ids`; times[0] is the first one's, times[i] that of token i.
static void generate(struct llama_context *context, int vocab_size, int prompt_count, int count,
                     llama_token *ids, double *times) {
  llama_token *prompt = malloc(prompt_count * sizeof *prompt);
  for (int i = 0; i < prompt_count; i++) prompt[i] = (int64_t)i * 7919 % vocab_size;
  llama_memory_clear(llama_get_memory(context), true);
  double last = now_us();
  for (int done = 0; done < prompt_count; done += STEP_TOKENS_MAX) {
    int rest = prompt_count - done;
    int step = rest < STEP_TOKENS_MAX ? rest : STEP_TOKENS_MAX;
    if (llama_decode(context, llama_batch_get_one(prompt + done, step))) fail("llama_decode");
  }
  for (int i = 0; i < count; i++) {
    ids[i] = best(context, vocab_size);
    double now = now_us();
    times[i] = now - last;
    last = now;
    if (i + 1 < count && llama_decode(context, llama_batch_get_one(ids + i, 1)))
      fail("llama_decode");
  }
  free(prompt);
}

int main(int argc, char **argv) {
  if (argc != 7) fail("wrong number of arguments");
  int threads = atoi(argv[2]), prompt_count = atoi(argv[3]), count = atoi(argv[4]);
  llama_log_set(quiet, NULL);
  llama_backend_init();

  struct llama_model_params model_params = llama_model_default_params();
  model_params.load_mode =
      strcmp(argv[5], "mmap") ? LLAMA_LOAD_MODE_NONE : LLAMA_LOAD_MODE_MMAP;
  struct llama_model *model = llama_model_load_from_file(argv[1], model_params);
  if (!model) fail("the model cannot be loaded");
  int vocab_size = llama_vocab_n_tokens(llama_model_get_vocab(model));

  struct llama_context_params context_params = llama_context_default_params();
  context_params.n_ctx = prompt_count + count + 1;
  context_params.n_batch = context_params.n_ubatch = STEP_TOKENS_MAX;
  context_params.n_threads = context_params.n_threads_batch = threads;
  context_params.no_perf = true;
  struct llama_context *context = llama_init_from_model(model, context_params);
  if (!context) fail("no context");
  struct ggml_threadpool_params pool_params = ggml_threadpool_params_default(threads);
  pool_params.poll = atoi(argv[6]);
  struct ggml_threadpool *pool = ggml_threadpool_new(&pool_params);
  llama_attach_threadpool(context, pool, pool);

  llama_token *ids = malloc(count * sizeof *ids);
  double *times = malloc(count * sizeof *times);
  generate(context, vocab_size, prompt_count, count, ids, times);
  generate(context, vocab_size, prompt_count, count, ids, times);
  printf("{\"ids\": [");
  for (int i = 0; i < count; i++) printf("%s%d", i ? ", " : "", ids[i]);
  printf("], \"ttft_us\": %.1f, \"tpot_us\": [", times[0]);
  for (int i = 1; i < count; i++) printf("%s%.1f", i > 1 ? ", " : "", times[i]);
  printf("]}\n");
  return 0;
}
