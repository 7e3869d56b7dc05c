// Socket calls, with the options of all RDT connections.
#pragma once

#include <sys/socket.h>

#include <string>

#include "ray/rdt/address.h"
#include "ray/rdt/fd.h"

namespace ray::rdt {

// Runs on: any thread; none of these block. Functions that listen throw
// std::system_error; functions that connect return an empty Fd and set errno.

// "@ray-rdt-<agent id in hex>": abstract, so it needs no file and ends with its process.
Fd ListenUnix(const AgentId &agent);
Fd ListenTcp(const std::string &ip, uint16_t *port);
Fd AcceptOne(int listener);

// EINPROGRESS counts as success: SocketError has the result once the socket is writable.
Fd ConnectUnix(const AgentId &agent);
Fd ConnectTcp(const std::string &ip, uint16_t port);

// Disables Nagle's algorithm, and detects a dead host after peer_timeout_s.
void TuneTcp(int fd, double peer_timeout_s);

// The result of a connect that was in progress; 0 if connected.
int SocketError(int fd);

// `pid` is in our pid namespace; 0 if it cannot be seen from here.
ucred PeerCredentials(int unix_fd);

// Becomes readable when the process exits. Empty if the kernel does not support it.
Fd OpenPidFd(pid_t pid);

// True for an errno that means that descriptors or memory have run out.
bool IsShortage(int error);

bool IsReadable(int fd);
// True if the other end of a stream is closed.
bool IsHungUp(int fd);

}  // namespace ray::rdt
