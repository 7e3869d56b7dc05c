#include "ray/rdt/net.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <system_error>

#include "ray/rdt/limits.h"

namespace ray::rdt {
namespace {

constexpr int kStreamFlags = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;

struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
  sockaddr *get() { return reinterpret_cast<sockaddr *>(&storage); }
};

SocketAddress UnixName(const AgentId &agent) {
  SocketAddress name;
  std::string text = "ray-rdt-" + Hex(agent);
  sockaddr_un un{};
  un.sun_family = AF_UNIX;
  // The leading zero byte is what makes the name abstract.
  std::memcpy(un.sun_path + 1, text.data(), text.size());
  std::memcpy(&name.storage, &un, sizeof(un));
  name.length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return name;
}

// False if `ip` is not a numeric address.
bool TcpName(const std::string &ip, uint16_t port, SocketAddress *name) {
  addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo *found = nullptr;
  if (getaddrinfo(ip.c_str(), std::to_string(port).c_str(), &hints, &found) != 0)
    return false;
  std::memcpy(&name->storage, found->ai_addr, found->ai_addrlen);
  name->length = found->ai_addrlen;
  freeaddrinfo(found);
  return true;
}

Fd Listen(SocketAddress name, const std::string &what) {
  Fd fd(socket(name.storage.ss_family, kStreamFlags, 0));
  fd.CloseInChildren();
  bool is_up = fd && bind(fd.get(), name.get(), name.length) == 0 &&
               listen(fd.get(), limits::kListenBacklog) == 0;
  if (!is_up) throw std::system_error(errno, std::generic_category(), what);
  return fd;
}

Fd ConnectTo(SocketAddress name) {
  Fd fd(socket(name.storage.ss_family, kStreamFlags, 0));
  if (!fd) return fd;
  fd.CloseInChildren();
  int result = connect(fd.get(), name.get(), name.length);
  return result == 0 || errno == EINPROGRESS ? std::move(fd) : Fd();
}

void SetOption(int fd, int level, int option, int value) {
  setsockopt(fd, level, option, &value, sizeof(value));
}

short PollNow(int fd, short events) {
  pollfd one{.fd = fd, .events = events, .revents = 0};
  return poll(&one, 1, 0) > 0 ? one.revents : static_cast<short>(0);
}

}  // namespace

Fd ListenUnix(const AgentId &agent) {
  return Listen(UnixName(agent), "listen on a Unix socket");
}

Fd ListenTcp(const std::string &ip, uint16_t *port) {
  SocketAddress name;
  if (!TcpName(ip, 0, &name)) {
    throw std::system_error(
        EINVAL, std::generic_category(), "not a numeric address: " + ip);
  }
  Fd fd = Listen(name, "listen on " + ip);
  getsockname(fd.get(), name.get(), &name.length);
  // The port lies at the same place in both families.
  *port = ntohs(reinterpret_cast<sockaddr_in *>(name.get())->sin_port);
  return fd;
}

Fd AcceptOne(int listener) {
  Fd fd(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  fd.CloseInChildren();
  return fd;
}

Fd ConnectUnix(const AgentId &agent) { return ConnectTo(UnixName(agent)); }

Fd ConnectTcp(const std::string &ip, uint16_t port) {
  SocketAddress name;
  if (TcpName(ip, port, &name)) return ConnectTo(name);
  errno = EINVAL;
  return Fd();
}

void TuneTcp(int fd, double peer_timeout_s) {
  int interval_s =
      std::max(1, static_cast<int>(peer_timeout_s / (limits::kKeepaliveProbes + 1)));
  SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
  SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, interval_s);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, interval_s);
  SetOption(fd, IPPROTO_TCP, TCP_KEEPCNT, limits::kKeepaliveProbes);
  SetOption(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, static_cast<int>(peer_timeout_s * 1000));
}

int SocketError(int fd) {
  int error = 0;
  socklen_t length = sizeof(error);
  getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length);
  return error;
}

ucred PeerCredentials(int unix_fd) {
  ucred credentials{.pid = 0, .uid = static_cast<uid_t>(-1)};
  socklen_t length = sizeof(credentials);
  getsockopt(unix_fd, SOL_SOCKET, SO_PEERCRED, &credentials, &length);
  return credentials;
}

Fd OpenPidFd(pid_t pid) { return Fd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))); }

bool IsShortage(int error) {
  return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM;
}

bool IsReadable(int fd) { return (PollNow(fd, POLLIN) & POLLIN) != 0; }

bool IsHungUp(int fd) {
  return (PollNow(fd, POLLRDHUP) & (POLLRDHUP | POLLHUP | POLLERR | POLLNVAL)) != 0;
}

}  // namespace ray::rdt
