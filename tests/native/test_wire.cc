#include <random>

#include "check.h"
#include "ray/rdt/address.h"
#include "ray/rdt/wire.h"

namespace ray::rdt {
namespace {

Grant SomeGrant() {
  return {.total = 30, .spans = {{4096, 10}, {8192, 20}}, .attached = {1, 2}};
}

TEST("wire: a message comes back as it was") {
  auto grant = Unpack<Grant>(Pack(SomeGrant()));
  CHECK(grant && grant->total == 30 && grant->spans == SomeGrant().spans);
  CHECK(grant->attached == (Bytes{1, 2}));
  auto refuse = Unpack<Refuse>(Pack(Refuse{.code = 3, .text = "no"}));
  CHECK(refuse && refuse->code == 3 && refuse->text == "no");
}

TEST("wire: the frozen layout of header and ERROR") {
  Bytes frame =
      EncodeFrame(FrameType::kError, 7, Error{.version = 2, .code = 4, .text = "x"});
  Bytes expected = {'R', 'R', 'D', 'T', 2, 0, 1, 0, 8, 0, 0, 0, 0, 0, 0, 0,
                    7,   0,   0,   0,   0, 0, 0, 0, 2, 0, 4, 1, 0, 0, 0, 'x'};
  CHECK(frame == expected);
}

TEST("wire: no truncated or extended message is accepted") {
  Bytes whole = Pack(SomeGrant());
  for (size_t n = 0; n < whole.size(); ++n)
    CHECK(!Unpack<Grant>(ByteView(whole).first(n)));
  whole.push_back(0);
  CHECK(!Unpack<Grant>(whole));
}

TEST("wire: a count larger than its message is refused before memory is taken") {
  Bytes bytes(8, 0);  // total
  bytes.insert(bytes.end(), {0xff, 0xff, 0xff, 0xff});
  CHECK(!Unpack<Grant>(bytes));
}

TEST("wire: random bytes never do harm") {
  std::minstd_rand random(5);
  for (int i = 0; i < 20000; ++i) {
    Bytes bytes(random() % 64);
    for (uint8_t &byte : bytes) byte = static_cast<uint8_t>(random() >> 8);
    Unpack<Grant>(bytes);
    Unpack<KeyList>(bytes);
    Unpack<Hello>(bytes);
    Unpack<Refuse>(bytes);
    ParseAddress(bytes);
  }
}

TEST("wire: an address comes back, and one of another version tells only that") {
  AgentId id{};
  id.fill(9);
  Address address = DescribeThisProcess(id);
  address.ip = "10.1.2.3";
  address.port = 77;
  auto parsed = ParseAddress(Pack(address));
  CHECK(parsed && parsed->agent == id && parsed->ip == "10.1.2.3" && parsed->port == 77);
  CHECK(parsed->SharesHostWith(address));
  parsed->net_namespace += 1;
  CHECK(!parsed->SharesHostWith(address));
  address.version = 9;
  parsed = ParseAddress(Pack(address));
  CHECK(parsed && parsed->version == 9 && parsed->ip.empty());
}

TEST("spans: slices follow the logical offset over empty and odd spans") {
  char memory[100];
  auto at = [&](size_t i) { return reinterpret_cast<uint64_t>(memory + i); };
  SpanList list({{at(0), 3}, {at(50), 0}, {at(10), 7}, {at(90), 1}});
  CHECK_EQ(list.total(), 11u);
  std::vector<iovec> pieces;
  CHECK_EQ(list.Slice({2, 9}, &pieces), 9u);
  CHECK_EQ(pieces.size(), 3u);
  CHECK(pieces[0].iov_base == memory + 2 && pieces[0].iov_len == 1);
  CHECK(pieces[1].iov_base == memory + 10 && pieces[1].iov_len == 7);
  CHECK_EQ(list.Slice({3, 2}, &pieces), 2u);
  CHECK(pieces[0].iov_base == memory + 10);
}

TEST("spans: a slice holds no more pieces than one system call takes") {
  std::vector<char> memory(3000);
  std::vector<Span> spans;
  for (char &byte : memory) spans.push_back({reinterpret_cast<uint64_t>(&byte), 1});
  SpanList list(spans);
  std::vector<iovec> pieces;
  CHECK_EQ(list.Slice({0, 3000}, &pieces), SpanList::kMaxIovecs);
}

TEST("spans: sums that overflow are refused") {
  uint64_t total;
  CHECK(!TotalOf({{~0ull, 2}}, &total));
  CHECK(!TotalOf({{0, ~0ull}, {0, 1}}, &total));
  CHECK(TotalOf({}, &total) && total == 0);
}

}  // namespace
}  // namespace ray::rdt
