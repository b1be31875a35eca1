// The real tokens of a row, cut into segments. No includes of the standard library: see parallel.h.
#pragma once

#include "parallel.h"

namespace vision_scan {

constexpr int64_t kAhead = 8;  // tokens between asking for memory and using it

struct Segment {
  int64_t begin, end;  // in Row::cells
};

// Padding is left out, so that nothing behind this has to know of it; every segment but a row's first starts
// from zeros. See vision_scan/ops/reference/segments.py for the meaning of seq_idx.
struct Row {
  int64_t batch, list;
  std::vector<int64_t> cells;
  std::vector<Segment> segments;  // at least one, maybe empty

  Row(const Tokens& tokens, int64_t row) {
    const bool packed = tokens.cu_seqlens != nullptr;
    batch = packed ? 0 : row / tokens.lists;
    list = packed ? 0 : row % tokens.lists;
    const int64_t begin = packed ? tokens.cu_seqlens[row] : 0;
    const int64_t end = packed ? tokens.cu_seqlens[row + 1] : tokens.seqlen;
    cells.reserve(end - begin);
    int64_t start = 0, last = -1;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t cell = tokens.index ? tokens.index[list * tokens.seqlen + t] : t;
      const int64_t segment = tokens.seq_idx ? tokens.seq_idx[batch * tokens.seqlen + t] : 0;
      if (cell < 0 || segment < 0) continue;
      const int64_t place = static_cast<int64_t>(cells.size());
      if (last >= 0 && segment != last) {
        segments.push_back({start, place});
        start = place;
      }
      last = segment;
      cells.push_back(cell);
    }
    segments.push_back({start, static_cast<int64_t>(cells.size())});
  }

  // Offset of (batch, list, cell) in a tensor (batch, lists, cells, ...) whose cells are `stride` apart.
  int64_t offset(const Tokens& tokens, int64_t place, int64_t stride) const {
    return ((batch * tokens.lists + list) * tokens.cells + cells[place]) * stride;
  }
};

}  // namespace vision_scan
