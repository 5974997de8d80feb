-- For wrk: tells in each quarter of a second how many responses there were, as `SLOT number count`. The number is that of
-- the quarter since 1970; a quarter without a response is not told.
local ffi = require("ffi")
ffi.cdef [[
    typedef struct { long seconds, nanoseconds; } moment;
    int clock_gettime(int clock, moment *now);
]]
local now = ffi.new("moment")
local slot, count = 0, 0

function response()
    ffi.C.clock_gettime(0, now)
    local current = tonumber(now.seconds) * 4 + math.floor(tonumber(now.nanoseconds) / 250000000)
    if current ~= slot then
        if count > 0 then
            io.write(string.format("SLOT %.0f %d\n", slot, count))
            io.flush()
        end
        slot, count = current, 0
    end
    count = count + 1
end
