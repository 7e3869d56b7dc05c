// Socket calls, with the options that every connection of ours has.
#pragma once

#include <string>

#include "ray/rdt/address.h"
#include "ray/rdt/fd.h"

namespace ray::rdt {

// Runs on: any thread; none of these block. Those that listen throw
// std::system_error; those that dial return an empty Fd and leave errno.

// "@ray-rdt-<agent id in hex>", abstract: it ends with its last holder and needs no file.
Fd ListenUnix(const AgentId &agent);
Fd ListenTcp(const std::string &ip, uint16_t *port);
Fd AcceptOne(int listener);

// EINPROGRESS counts as success: the result shows once the socket is writable.
Fd ConnectUnix(const AgentId &agent);
Fd ConnectTcp(const std::string &ip, uint16_t port);

// No delay for small frames; a dead host is noticed after peer_timeout_s.
void TuneTcp(int fd, double peer_timeout_s);

// The result of a dial that was in progress; 0 when connected.
int SocketError(int fd);

struct Credentials {
  pid_t pid = 0;  // in our pid namespace; 0 if it cannot be seen from here
  uid_t uid = static_cast<uid_t>(-1);
};
Credentials PeerCredentials(int unix_fd);

// Becomes readable when the process ends; empty where the kernel has none.
Fd OpenPidFd(pid_t pid);

// Of an errno: there is no descriptor or memory left for a connection.
bool IsShortage(int error);

bool IsReadable(int fd);
// True when the other end of a stream is closed.
bool IsHungUp(int fd);

}  // namespace ray::rdt
