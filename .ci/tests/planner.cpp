// Behind the CUDA text's planner, see test_planner.py: plans of random shapes on eight cards, and
// what must hold of each, whatever the planner prefers: what the kernel takes for granted.
#include <chrono>
#include <random>
#include <sstream>
#include <string>
#include <vector>

namespace {

struct Random {
  std::mt19937_64 engine;

  int64_t below(int64_t n) { return int64_t(engine() % uint64_t(n)); }
  // From 1 to most, as many in each power of two.
  int64_t size(double most) {
    const double unit = double(engine() >> 11) / double(1ull << 53);
    return std::max<int64_t>(1, int64_t(std::exp2(unit * std::log2(most))));
  }
  template <typename... Ts>
  int64_t of(Ts... values) {
    const int64_t all[] = {values...};
    return all[below(sizeof...(values))];
  }
};

FusedBatchNormCall random_call(Random& r, int dtype, int elements_of_vector) {
  static int64_t counter;
  const int64_t bytes = kVectorBytes / elements_of_vector;
  const double most = double(r.of(1ll << 24, 1ll << 32, 1ll << 34)) / double(bytes);  // elements
  FusedBatchNormCall call = {};
  call.C = r.below(2) ? r.size(std::min(most, double((1ll << 31) - 512)))
                      : std::min<int64_t>(8 * (1 + r.below(256)), int64_t(most));
  const int64_t side = 1 + r.below(300), small = r.of(1, 4, 9, 14 * 14, 25, 28 * 28, 49, 56 * 56);
  const int64_t plane = r.of(r.size(most), side * side, small, small);
  call.HW = std::clamp<int64_t>(plane, 1, std::max<int64_t>(1, int64_t(most) / call.C));
  // As many images as the C++ text takes: see kMostOfGroup there.
  const double images = double((1ll << 31) - (1 << 20)) / double(call.HW / elements_of_vector + 2);
  call.N = r.size(std::clamp(most / double(call.C) / double(call.HW), 1., images));
  call.dtype = dtype;
  call.training = r.below(4) > 0;
  call.channels_last = call.HW == 1 || (call.C > 1 && r.below(2));
  call.cumulative = r.below(8) == 0;
  call.num_batches_tracked = r.below(8) ? &counter : nullptr;
  const int64_t misalignment = r.below(3) ? 0 : r.below(elements_of_vector);
  call.x = reinterpret_cast<const void*>(uintptr_t(1 << 20) + uintptr_t(misalignment * bytes));
  return call;
}

// Whether n / d comes out right, for n around multiples of d and the greatest that there are.
bool divides(const FastDivmod& d) {
  constexpr uint64_t kMost = (1ull << 31) - 1;
  const uint64_t last = kMost / d.divisor * d.divisor;
  for (const uint64_t n : {uint64_t(0), uint64_t(d.divisor) - 1, uint64_t(d.divisor), last - 1,
                           last, kMost - 1, kMost})
    if (n <= kMost && ((2 * n * d.magic) >> 32 >> d.shift) != n / d.divisor) return false;
  return true;
}

// What does not hold of the plan.
std::vector<std::string> broken(const FusedBatchNormCall& call, const Device& device, int size,
                                int sum_bytes, const Plan& p) {
  std::vector<std::string> found;
  const auto hold = [&](bool holds, const char* what) {
    if (!holds) found.push_back(what);
  };
  if (p.workers <= 0) return {"there is a plan"};
  const bool nhwc = is_nhwc(p.layout), extra = takes_extra(device.architecture);
  const int64_t team = p.team.divisor, width = p.width.divisor, segment = p.segment.divisor,
                stages = p.stages.divisor, step = p.step.divisor, pixels = call.N * call.HW,
                vectors = p.vectors, workers = p.workers, places = p.reg_vectors + p.smem_vectors;
  const int misalignment = int(uintptr_t(call.x) % kVectorBytes * size / kVectorBytes);

  // Groups: every channel is in one, every element in a vector.
  hold(nhwc == bool(call.channels_last), "the layout is x's");
  hold(int64_t(p.groups) * p.channels >= call.C && int64_t(p.groups - 1) * p.channels < call.C,
       "groups hold all channels");
  hold(nhwc || int64_t(p.groups) * p.channels == call.C, "planes are packed as C divides");
  hold(is_masked(p.layout) || (size > 2 && misalignment == 0), "what is not masked is aligned");
  hold(vectors % width == 0 && vectors < int64_t(1) << 31, "vectors are whole lines, in 31 bits");
  if (!nhwc) {
    hold(vectors == call.N * width, "an image is a line");
    hold(is_masked(p.layout)
             ? width * size >= call.HW + size - 1 && (width - 1) * size < call.HW + size - 1 + size
             : width * size == call.HW * p.channels,
         "a line holds the planes");
    hold(p.layout != kNchwPacked || (segment == call.HW && call.HW >= size - 1),
         "a packed vector has elements of two planes at most");
    hold(p.layout == kNchwPacked || p.channels == 1, "other groups have one channel");
  } else if (p.layout == kNhwc) {
    hold(p.pixels == 1 && segment * size == p.channels && width == segment &&
             call.C % p.channels == 0 && vectors == pixels * width,
         "whole pixels are whole");
  } else if (segment == width && p.pixels > 1) {
    hold(width * size == p.pixels * call.C && p.channels == call.C,
         "a line holds whole pixels of all channels");
    hold(vectors * size >= pixels * call.C + misalignment, "lines hold all pixels, from x on");
  } else {
    const bool shifted = p.pixels > 1 || misalignment > 0;
    hold(width == p.pixels * segment, "a line has a segment for each pixel");
    hold(segment * size >= p.channels + (shifted ? size : 0) - (p.channels % size ? 0 : shifted),
         "a segment holds the channels wherever it begins");
    hold(vectors / width * p.pixels >= pixels, "lines hold all pixels");
    hold(p.channels % size == 0 || p.groups == 1, "groups begin with a vector");
  }

  // Teams: every group is worked on once.
  hold(p.teams >= 1 && p.teams <= std::max(p.groups, 1), "no team without a group");
  hold(int64_t(p.teams) * p.rounds >= p.groups && int64_t(p.teams) * (p.rounds - 1) < p.groups,
       "rounds hold all groups");
  hold(team * p.teams < int64_t(1) << 31, "the grid is numbered in 31 bits");
  const bool waits = call.training && team > 1;
  const bool counts = call.training && call.cumulative && call.num_batches_tracked;
  hold(p.cooperative == (waits || counts), "the launch is cooperative where blocks wait");

  // Blocks and threads: every vector has one owner. Vector rank·share + thread + k·step is k-th of
  // its thread's.
  hold(step == workers || step == team * workers, "threads take turns, or blocks and threads");
  hold(team == 1 ||
           (step == workers ? p.share == p.vectors_per_thread * workers : p.share == workers),
       "blocks begin behind each other");
  hold(team * p.vectors_per_thread * workers >= vectors, "the threads own all vectors");
  hold(team * (p.vectors_per_thread - 1) * workers < vectors || vectors == 0,
       "no thread has a place for more than there is");
  if (vectors <= 4096 && team * workers <= 4096) {
    std::vector<int> owners(vectors);
    for (int64_t rank = 0; rank < team; ++rank)
      for (int64_t thread = 0; thread < workers; ++thread)
        for (int64_t k = 0, v = rank * p.share + thread; k < p.vectors_per_thread && v < vectors;
             ++k, v += step)
          ++owners[v];
    hold(std::count(owners.begin(), owners.end(), 1) == vectors, "each vector has one owner");
  }
  if (keeps_column(p.layout)) {
    hold(step % width == 0 && p.share % width == 0, "a thread keeps its column");
    hold(fits_warp(p.layout, unsigned(width)) ? workers % 32 == 0 && 32 % width == 0
                                              : workers % width == 0,
         "workers come in whole lines");
  } else {
    hold(workers % 32 == 0, "workers come in whole warps");
  }
  const int threads = block_threads(p);
  hold(threads <= kMaxThreads && threads <= resident_threads(p.layout, size, p.deep, extra),
       "a block has registers");

  // Places.
  hold(p.reg_vectors >= 0 && p.smem_vectors >= 0 && places <= p.vectors_per_thread,
       "places are as many as vectors at most");
  hold(p.reg_vectors <= register_vectors(p.layout, size, p.deep, extra) &&
           (stages == 1 || p.reg_vectors == 0),
       "registers hold one group, of so many vectors");
  hold(places == p.vectors_per_thread || (call.training && stages == 1 &&
                                          can_reread(p.layout, p.deep) && p.smem_vectors >= kRing),
       "what is read again passes through a ring");
  hold(!p.deep || (p.layout == kNchw && size > 2), "such a kernel is there");

  // Exchange.
  hold(stages >= 1 && stages <= std::min(kMaxStages, std::max(p.rounds, 1)),
       "no more groups in flight than rounds");
  hold(p.unit_bits >= 0 && p.unit_bits <= 5 && p.units << p.unit_bits >= p.channels &&
           (p.units - 1) << p.unit_bits < p.channels && p.exchange_warps == p.units * stages,
       "exchange warps have all channels, 32 of them at most");
  const bool by_warp = !keeps_column(p.layout) || fits_warp(p.layout, unsigned(width));
  hold(p.partial_lines == ceil_div(workers, by_warp ? 32 : width), "a partial sum for each line");
  hold(
      !call.training ||
          (nhwc ? p.partial_stride >= p.partial_lines * width &&
                      p.partials >= (size - 1) * int64_t(p.partial_stride) + p.partial_lines * width
                : p.partials >= p.partial_lines * (p.layout == kNchwPacked ? 2 * width : 1)),
      "and for each entry of it");
  hold(keeps_column(p.layout) || p.partial_lines <= 32, "a warp adds up its block's sums");
  const int64_t slots = (team + 1) * p.channels * 2 * sum_bytes;
  hold(!waits || p.group_bytes >= kLineBytes * p.units + slots, "scratch memory holds the slots");

  // Shared memory.
  const int64_t numbers = 2 * int64_t(p.partials) + 5 * int64_t(p.channels);
  hold(p.stage_at >= int64_t(sizeof(Head)) + stages * p.smem_vectors * workers * kVectorBytes &&
           p.stage_at % kVectorBytes == 0,
       "the places have room");
  hold(p.stage_bytes >= numbers * sum_bytes && p.stage_bytes % kVectorBytes == 0,
       "a stage has room");
  hold(p.shared_bytes >= p.stage_at + stages * p.stage_bytes &&
           p.shared_bytes <= device.shared_bytes,
       "a block has shared memory");
  const int64_t piece = device.architecture < 80 ? 256 : 128;  // it is given in these
  const int64_t taken = ceil_div(p.shared_bytes, piece) * piece + device.reserved_bytes;
  const int64_t resident =
      std::min<int64_t>((device.shared_bytes + device.reserved_bytes) / taken,
                        resident_threads(p.layout, size, p.deep, extra) / threads);
  hold(!p.cooperative || team * p.teams <= resident * device.multiprocessors,
       "a cooperative grid is co-resident");

  for (const FastDivmod& d : {p.width, p.segment, p.team, p.stages, p.step})
    hold(divides(d), "division is multiplication");
  return found;
}

struct Card {
  int multiprocessors, kilobytes, architecture;
};
constexpr Card kCards[] = {{132, 227, 90}, {108, 163, 80},  {58, 99, 89}, {40, 64, 75},
                           {170, 99, 120}, {148, 227, 100}, {3, 16, 90},  {1, 48, 86}};

double now_us() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

}  // namespace

// Plans `count` shapes; returns what does not hold of them, at most some lines. us: of a plan,
// made and remembered, in the mean.
extern "C" const char* try_plans(int64_t seed, int64_t count, double us[2]) {
  static std::string text;
  std::ostringstream lines;
  int left = 20;
  Random r{std::mt19937_64(uint64_t(seed))};
  us[0] = us[1] = 0;
  for (int64_t i = 0; i < count && left > 0; ++i) {
    const int dtype = int(r.below(4)), size = dtype == 0 ? 4 : dtype == 3 ? 2 : 8;
    const int sum_bytes = dtype == 3 ? 8 : 4;
    const Card& card = kCards[i % std::size(kCards)];
    const FusedBatchNormCall call = random_call(r, dtype, size);
    Device device;
    device.multiprocessors = card.multiprocessors;
    device.shared_bytes = card.kilobytes << 10;
    device.reserved_bytes = card.architecture < 80 ? 0 : 1024;
    device.architecture = card.architecture;
    const double start = now_us();
    const Plan p = make_plan(call, device, size, sum_bytes);
    const double made = now_us();
    const Plan again = make_plan(call, device, size, sum_bytes);
    us[1] += (now_us() - made) / double(count);
    us[0] += (made - start) / double(count);
    auto found = broken(call, device, size, sum_bytes, p);
    if (memcmp(&p, &again, sizeof p)) found.push_back("a plan is remembered as it was");
    for (const auto& what : found)
      if (left-- > 0)
        lines << "not so: " << what << ": N " << call.N << ", C " << call.C << ", HW " << call.HW
              << ", type " << call.dtype << ", training " << call.training << ", channels-last "
              << call.channels_last << ", cumulative " << call.cumulative << ", x "
              << uintptr_t(call.x) % kVectorBytes << " bytes from a boundary, "
              << card.multiprocessors << " multiprocessors of " << card.kilobytes << " KB, sm_"
              << card.architecture << '\n';
  }
  text = lines.str();
  return text.c_str();
}
