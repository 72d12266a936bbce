// FastV on unmodified libllama: the head runs on the whole prompt, visual tokens are ranked by the attention of its last
// layer, and the tail, and all of decoding, run on what is kept. Each half has a context, and so a KV length, of its own.
// At K = 0 there is no head: the whole model runs on what is kept, by a rule that looks at no attention.
//
// Shapes: n prompt tokens, m kept tokens, d width, H query heads, G KV heads, c head dimension, v vocabulary.
#pragma once

#include <fastv/fastv.hpp>

#include "halves.hpp"
#include "rows.hpp"

namespace llava {

// What goes into the model in one call: tokens of text, or a picture's rows.
struct Piece {
  std::vector<llama_token> tokens;   // text, or
  std::vector<float> rows;           // [count, Halves::input()] of a picture
  std::size_t count = 0;             // tokens
  std::size_t columns = 0;           // of a picture: tokens in a row of it; 0 where they are no grid
  bool causal = true;                // false: the picture's tokens see each other (Gemma 3)
  bool continues = false;            // the picture of the last piece that was one goes on (tiles of one picture)
  std::vector<llama_pos> positions;  // [axes, count], an axis after the other; M-RoPE has 4
  std::string picture;               // what its rows are kept under in an album
};

// A prompt, or a later turn of a conversation.
struct Prompt {
  std::vector<Piece> pieces;
  llama_pos next_position = 0;  // of the first decoded token

  std::size_t tokens() const;                    // n
  std::vector<fastv::TokenSpan> visual() const;  // sorted
  // Appends text at the next positions.
  void add_text(std::vector<llama_token> tokens, std::size_t axes);
};

struct EngineOptions {
  std::size_t context = 4096;     // -c: tokens of all sequences together; 0: what the model was made for
  std::size_t batch = 2048;       // -b: tokens that go into libllama in one call
  std::size_t micro_batch = 512;  // -ub: tokens that go through the layers at a time
  std::size_t sequences = 1;
  int threads = 0;                  // -t; 0: one a core
  bool every_layer = false;         // Reading::attention, which costs a look at each layer
  bool features = false;            // Reading::features, for Selection::diverse
  bool by_head = false;             // Reading::by_head
  std::vector<float> head_weights;  // [H]: of layer K-1's heads in Reading::scores; empty: all alike
  ggml_type key_type = GGML_TYPE_F16, value_type = GGML_TYPE_F16;  // --cache-type-k, --cache-type-v
};

// A prompt as the layers below K left it, and what its visual tokens are ranked by. It can be finished more than once.
struct Reading {
  Rows rows;                             // [n, d], hidden rows
  std::vector<llama_pos> positions;      // [axes, n]
  std::vector<Piece> pieces;             // without tokens and rows, but at K = 0
  std::vector<fastv::TokenSpan> visual;  // sorted
  // Attention that the last token pays in layer K-1; nothing at K = 0.
  std::vector<float> scores;      // [n]: mean over heads, or weighted sum; 0 for text
  std::vector<float> by_head;     // [H, visual tokens]: what each head pays; empty: not asked for, as below
  std::vector<float> features;    // [visual tokens, G * c]: keys of layer K-1; at K = 0 [.., d]: the embeddings
  std::vector<double> attention;  // what of it goes to visual tokens, by layer below K
  llama_pos next_position = 0;
  std::size_t tokens = 0;  // n
  double seconds = 0;
};

// [n]: scores from Reading::by_head, each head's attention times its weight, [H].
std::vector<float> weighted_scores(const Reading& reading, const std::vector<float>& weights);

struct Prefill {
  std::vector<fastv::Index> kept;  // prompt positions, ascending
  std::vector<float> scores;       // [n], as of Reading
  double seconds = 0;              // from the prompt to the logits, both halves
};

// Decoded tokens as the tail reads them: hidden rows [count, d] of the head, or, where there is none, as they are.
struct Steps {
  Rows rows;
  std::vector<llama_token> tokens;

  void append(const Steps& more) {
    rows.append(more.rows);
    tokens.insert(tokens.end(), more.tokens.begin(), more.tokens.end());
  }
};

class Head;
class Tail;

// Whatever throws while a prompt is read, finished or decoded leaves its sequence half done: forget() it.
class Engine {
 public:
  // Throws std::runtime_error where libllama makes no context of this size, std::invalid_argument where the weights are not
  // as many as the heads.
  Engine(const Halves& halves, const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  const Halves& halves() const { return halves_; }
  std::size_t batch() const { return options_.batch; }      // tokens that go into libllama in one call, at most
  std::size_t context() const { return options_.context; }  // tokens of all sequences together

  // All lengths, before anything runs; throws std::invalid_argument with what is wrong with the settings.
  fastv::Plan plan(const Prompt& prompt, const fastv::Config* config) const;

  // Runs the head on a prompt, behind what the sequence holds. progress: share of its tokens.
  Reading read(std::size_t sequence, const Prompt& prompt, const Progress& progress = {});
  // The prompt positions that stay. config: null keeps every token. Throws std::invalid_argument.
  std::vector<fastv::Index> select(const Reading& reading, const fastv::Config* config) const;
  // Runs the tail on what is kept, behind what the sequence holds there. logits(0) are those behind the last token.
  void finish(std::size_t sequence, const Reading& reading, const std::vector<fastv::Index>& kept,
              const Progress& progress = {});
  // The three in a row.
  Prefill prefill(std::size_t sequence, const Prompt& prompt, const fastv::Config* config,
                  const Progress& progress = {});

  // Feeds one token to each of some sequences. logits(i) are those behind the i-th.
  struct Next {
    std::size_t sequence;
    llama_token token;
  };
  void decode(const std::vector<Next>& tokens);
  // Its two halves, so that steps can go through the tail more than once: the head on one token each, there until the next
  // call; and the tail on `count` of some steps, from one on, whose tokens follow each other from a position on. logits(i)
  // are those behind the i-th.
  const Steps& advance(const std::vector<Next>& tokens);
  void conclude(std::size_t sequence, const Steps& steps, std::size_t first, std::size_t count, llama_pos position);

  const float* logits(std::size_t row) const;  // [v], until the next call
  llama_context* tail() const;                 // for llama_sampler_sample()

  llama_pos next_position(std::size_t sequence) const { return sequences_.at(sequence).next_position; }
  std::size_t length(std::size_t sequence, std::size_t layer) const;  // keys of a layer
  // Of keys and values in use, in a layer with a window of no more than that.
  std::size_t cache_bytes(std::size_t sequence) const;
  std::size_t cache_bytes(const fastv::Plan& plan) const;  // behind the prompt

  // The head forgets the last tokens of a sequence, whose tail has been forgotten. Recurrent layers cannot, nor windows that
  // have gone on too far: then nothing changes, and it is false.
  bool take_back(std::size_t sequence, std::size_t tokens);
  void forget(std::size_t sequence);  // all of it
  void forget_tail(
      std::size_t sequence);  // what was finished, so that a reading of a new sequence can be finished anew

 private:
  struct Sequence {
    llama_pos next_position = 0;      // of the next token, as the model counts
    std::size_t head = 0, tail = 0;   // tokens in either cache
    std::vector<std::int64_t> cells;  // of the head's cache, token by token
  };
  Sequence& at(std::size_t sequence);
  template <class Length>
  std::size_t bytes_of(const Length& length) const;
  void expect_position(llama_pos next) const;
  void expect_together(std::size_t tokens) const;
  void run_head(Sequence& state, llama_seq_id sequence, const Prompt& prompt, Reading& reading,
                const Progress& progress);
  void run_tail(const Steps& steps, std::size_t first, const std::vector<std::size_t>& sequences,
                const std::vector<llama_pos>& positions);

  const Halves& halves_;
  EngineOptions options_;
  std::vector<Sequence> sequences_;
  std::size_t first_row_ = 0;  // of the last call's logits, in its batch
  Devices devices_;
  std::unique_ptr<Head> head_;  // null at K = 0
  Steps steps_;                 // of advance()
  std::unique_ptr<Tail> tail_;
};

}  // namespace llava
