#include "rows.hpp"

#include <algorithm>
#include <stdexcept>

namespace llava {

ggml_backend_t Devices::of(const ggml_tensor* tensor) {
  ggml_backend_dev_t device = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(root(tensor)->buffer));
  ggml_backend_ptr& queue = queues_[device];
  if (!queue) queue.reset(ggml_backend_dev_init(device, nullptr));
  if (!queue) throw std::runtime_error(std::string("ggml makes no queue for ") + ggml_backend_dev_name(device));
  return queue.get();
}

DeviceGraph::DeviceGraph(ggml_backend_t queue, std::size_t tensors) : queue_(queue), tensors_(tensors) {
  context_.reset(
      ggml_init({tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(tensors, false), nullptr, true}));
  memory_.reset(ggml_gallocr_new(ggml_backend_get_default_buffer_type(queue)));
}

ggml_tensor* DeviceGraph::borrow(const ggml_tensor* tensor) {
  ggml_tensor* own = ggml_new_tensor(context(), tensor->type, GGML_MAX_DIMS, tensor->ne);
  std::copy_n(tensor->nb, GGML_MAX_DIMS, own->nb);
  own->buffer = root(tensor)->buffer;
  own->data = tensor->data;
  own->extra = root(tensor)->extra;
  return own;
}

bool DeviceGraph::compute(ggml_tensor* result, const std::function<void()>& fill) {
  ggml_cgraph* graph = ggml_new_graph_custom(context(), tensors_, false);
  ggml_build_forward_expand(graph, result);
  for (int i = 0; i < ggml_graph_n_nodes(graph); ++i)
    if (!ggml_backend_supports_op(queue_, ggml_graph_node(graph, i))) return false;
  if (!ggml_gallocr_alloc_graph(memory_.get(), graph))
    throw std::runtime_error(std::string(ggml_backend_name(queue_)) + " has no memory left to rank tokens in");
  if (fill) fill();
  if (ggml_backend_graph_compute(queue_, graph) != GGML_STATUS_SUCCESS)
    throw std::runtime_error(std::string(ggml_backend_name(queue_)) + " cannot rank tokens");
  return true;
}

ggml_tensor Rows::part(std::size_t first, std::size_t count) const {
  ggml_tensor part{};
  part.type = GGML_TYPE_F32;
  const std::size_t row = size(width_) * sizeof(float);
  const std::int64_t ne[] = {width_, static_cast<std::int64_t>(count), 1, 1};
  const std::size_t nb[] = {sizeof(float), row, count * row, count * row};
  std::copy_n(ne, GGML_MAX_DIMS, part.ne);
  std::copy_n(nb, GGML_MAX_DIMS, part.nb);
  part.buffer = buffer_.get();
  part.data = static_cast<char*>(ggml_backend_buffer_get_base(buffer_.get())) + first * row;
  return part;
}

void Rows::append(const ggml_tensor* rows) {
  const std::size_t more = size(ggml_nrows(rows));
  width_ = rows->ne[0];
  if (count_ + more > held_) {
    Rows larger;
    larger.width_ = width_;
    larger.held_ = std::max({room_, 2 * held_, count_ + more});
    ggml_backend_buffer_type_t memory = ggml_backend_buffer_get_type(root(rows)->buffer);
    larger.buffer_.reset(ggml_backend_buft_alloc_buffer(memory, larger.held_ * size(width_) * sizeof(float)));
    if (!larger.buffer_)
      throw std::runtime_error(std::string(ggml_backend_buft_name(memory)) + " has no memory left for " +
                               std::to_string(larger.held_) + " hidden rows: use a shorter prompt");
    if (count_ > 0) {
      ggml_tensor from = part(0, count_), to = larger.part(0, count_);
      ggml_backend_tensor_copy(&from, &to);
    }
    larger.count_ = count_;
    larger.room_ = room_;
    *this = std::move(larger);
  }
  // The same rows, whatever dimensions they have been counted in.
  ggml_tensor to = part(count_, more), from = to;
  from.buffer = root(rows)->buffer;
  from.data = rows->data;
  from.extra = root(rows)->extra;
  ggml_backend_tensor_copy(&from, &to);
  count_ += more;
}

void Rows::append(const Rows& rows) {
  if (rows.count_ == 0) return;
  const ggml_tensor all = rows.part(0, rows.count_);
  append(&all);
}

void Rows::write(std::size_t first, ggml_tensor* to) const {
  ggml_tensor from = part(first, size(ggml_nrows(to)));
  std::copy_n(to->ne, GGML_MAX_DIMS, from.ne);
  std::copy_n(to->nb, GGML_MAX_DIMS, from.nb);
  ggml_backend_tensor_copy(&from, to);
}

Rows Rows::pick(const std::vector<fastv::Index>& which, Devices& devices) const {
  Rows picked;
  const ggml_tensor all = part(0, count_);
  if (!on_host()) {
    DeviceGraph graph(devices.of(&all), 8);
    ggml_tensor* numbers = ggml_new_tensor_1d(graph.context(), GGML_TYPE_I32, static_cast<std::int64_t>(which.size()));
    ggml_set_input(numbers);
    ggml_tensor* rows = ggml_get_rows(graph.context(), graph.borrow(&all), numbers);
    const std::vector<std::int32_t> numbers_on_host(which.begin(), which.end());
    if (graph.compute(rows,
                      [&] { ggml_backend_tensor_set(numbers, numbers_on_host.data(), 0, ggml_nbytes(numbers)); })) {
      picked.append(rows);
      return picked;
    }
  }
  picked.reserve(which.size());
  // Neighbours go together.
  for (std::size_t i = 0, j = 0; i < which.size(); i = j) {
    for (j = i + 1; j < which.size() && which[j] == which[j - 1] + 1;) ++j;
    const ggml_tensor run = part(which[i], j - i);
    picked.append(&run);
  }
  return picked;
}

}  // namespace llava
