// Every message, the frame header and agents' addresses, from any bytes: nothing is
// read past the end, and what is accepted is exactly what its encoder would write.
#include "fuzz.h"
#include "ray/rdt/address.h"

namespace fuzz {
namespace {

template <class M>
void Check(ByteView payload) {
  std::optional<M> message = Unpack<M>(payload);
  if (!message) return;
  Bytes again = Pack(*message);
  Require(std::equal(again.begin(), again.end(), payload.begin(), payload.end()),
          "a message that was accepted is encoded as it came");
}

using Checker = void (*)(ByteView);
constexpr Checker kCheckers[] = {Check<Error>,
                                 Check<Hello>,
                                 Check<Challenge>,
                                 Check<Proof>,
                                 Check<Welcome>,
                                 Check<PullRequest>,
                                 Check<Grant>,
                                 Check<Refuse>,
                                 Check<KeyList>,
                                 Check<Ring>,
                                 Check<Fill>,
                                 Check<Filled>,
                                 Check<Read>,
                                 Check<ChecksumRequest>,
                                 Check<ChecksumReply>};

Bytes Seed(size_t checker, const Bytes &payload) {
  Bytes seed = payload;
  seed.insert(seed.begin(), static_cast<uint8_t>(checker));
  return seed;
}

}  // namespace

std::vector<Bytes> Seeds() {
  Address address;
  address.ip = "127.0.0.1";
  return {Seed(0, Pack(Error{.text = "text"})),
          Seed(4, Pack(Welcome{})),
          Seed(6, Pack(Grant{.total = 3, .spans = {{1, 2}}, .attached = {1, 2, 3}})),
          Seed(8, Pack(KeyList{.keys = {Key{}, Key{}}})),
          Seed(15, Pack(address))};
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t *data, size_t nbytes) {
  using namespace fuzz;
  Script script(ByteView(data, nbytes));
  size_t kind = script.Number() % (std::size(kCheckers) + 1);
  ByteView payload = script.Rest();
  if (kind < std::size(kCheckers)) {
    kCheckers[kind](payload);
  } else if (auto address = ParseAddress(payload)) {
    address->Describe();
  }
  if (payload.size() >= sizeof(FrameHeader)) DecodeHeader(payload.data());
  return 0;
}
